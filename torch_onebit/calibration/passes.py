"""Running a model up to a layer without running everything before it again.

Most deep models are chains: blocks that run one after another, each on what the one before it
returned. Reaching a layer then takes the block that holds it and the inputs of that block, which
are those of the block before, run once more with its layers as they are by now. Layers must be
reached in the order they run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


class _Reached(Exception):
    """Stops a forward pass that has gone far enough."""


def as_call(batch: Any) -> Call:
    """A batch is a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(batch, dict):
        return (), batch
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


@torch.no_grad()
def run(module: nn.Module, call: Call) -> Any:
    """module on one call, whose first tensor it may change in place."""
    args, kwargs = call
    if args and isinstance(args[0], Tensor):
        args = (args[0].clone(), *args[1:])
    return module(*args, **kwargs)


def run_to(module: nn.Module, layer: nn.Module, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run module until layer has run for the first time.

    Returns (input, output, residual): the residual is what the output is added to, or None when the
    next thing that happens to the output is something else.
    """
    seen: list[Tensor] = []

    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend((args[0], output))
        mode.output = output

    handle = layer.register_forward_hook(hook)
    mode = _NextAddition()
    try:
        with mode:
            run(module, call)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0], seen[1], mode.residual


class _NextAddition(TorchFunctionMode):
    """Stops at the first operation that makes something of ``output``; notes what it adds to it."""

    output: Tensor | None = None
    residual: Tensor | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.output is not None and function in _ADDITIONS and not kwargs and len(args) == 2:
            others = [t for t in args if t is not self.output and isinstance(t, Tensor)]
            if len(others) == 1 and others[0].shape == self.output.shape:
                self.residual = others[0]
                raise _Reached
        result = function(*args, **(kwargs or {}))
        # Dropout in eval mode and a look at the shape make nothing of it.
        if self.output is not None and isinstance(result, Tensor) and result is not self.output:
            raise _Reached
        return result


_ADDITIONS = {
    torch.add,
    Tensor.add,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.add_,
    Tensor.__iadd__,
}


def inputs_of(module: nn.Module, block: nn.Module, call: Call) -> Call:
    """What block is called with when module runs."""
    calls: list[Call] = []

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _Reached

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run(module, call)
    except _Reached:
        pass
    finally:
        handle.remove()
    return calls[0]


class Passes:
    """The shortest way to every layer of a module, over some calls of it.

    Memory: per call, the inputs of one block; where a block contains a chain itself, of one more.

    Args:
        module: the model; its layers may be replaced between two calls of ``reach``.
        calls: what it is run on.
        chains: of ``find_chains``, as modules of this model.
    """

    def __init__(self, module: nn.Module, calls: list[Call], chains: list[nn.Module]) -> None:
        self.module, self.calls, self.chains = module, calls, chains
        self.chain: nn.Module | None = None  # where reach was last, and at which block of it
        self.index = 0
        self.block_calls: list[Call] = []
        self.inside: Passes | None = None

    def reach(self, layer: nn.Module) -> tuple[nn.Module, list[Call]]:
        """(module, calls): running this module on these calls gets to layer."""
        chain = next((chain for chain in self._own_chains() if _holds(chain, layer)), None)
        if chain is None:
            return self.module, self.calls
        index = next(i for i, block in enumerate(chain) if _holds(block, layer))
        if chain is not self.chain or index < self.index:
            self.chain, self.index, self.inside = chain, 0, None
            self.block_calls = [inputs_of(self.module, chain[0], call) for call in self.calls]
        while self.index < index:
            block = self.chain[self.index]
            for i, call in enumerate(self.block_calls):  # one at a time: the old inputs go
                (_, *others), kwargs = call
                self.block_calls[i] = (_hidden(run(block, call)), *others), kwargs
            self.index += 1
            self.inside = None
        if self.inside is None:
            self.inside = Passes(chain[index], self.block_calls, self.chains)
        return self.inside.reach(layer)

    def _own_chains(self) -> Iterator[nn.Module]:
        """Those inside this module, outer ones first."""
        return (module for module in self.module.modules() if any(module is c for c in self.chains))


def find_chains(model: nn.Module, call: Call) -> list[str]:
    """Names of the nn.ModuleLists and nn.Sequentials that run as chains on call.

    In a chain every block runs once, on the very tensor that the block before it returned (first,
    or alone) as its first argument, and on the same other arguments: tensors that nothing changes,
    numbers, strings, None and containers of these. A cache of keys and values is none of these.
    """
    containers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    }
    runs: dict[int, list[_Run]] = {id(b): [] for blocks in containers.values() for b in blocks}

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runs[id(block)].append(_Run(args, kwargs))

    def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        runs[id(block)][-1].end(output)

    handles = []
    for block in model.modules():
        if id(block) in runs:
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after))
    try:
        run(model, call)
    finally:
        for handle in handles:
            handle.remove()
    return [
        name
        for name, container in containers.items()
        if all(len(runs[id(block)]) == 1 for block in container)
        and all(runs[id(a)][0].leads_to(runs[id(b)][0]) for a, b in pairwise(container.children()))
    ]


class _Run:
    """One run of a block: which arguments and result. Keeps them: identities stay unique."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kept = [args, kwargs]
        self.hidden = _identity(args[0]) if args else None
        self.others = _identity((args[1:], kwargs))
        self.result: Any = None

    def end(self, output: Any) -> None:
        self.kept.append(output)
        self.result = _identity(_hidden(output))

    def leads_to(self, following: "_Run") -> bool:
        return (
            isinstance(self.hidden, _Same)
            and isinstance(self.result, _Same)
            and self.result == following.hidden
            and self.others == following.others
        )


@dataclass(frozen=True)
class _Same:
    """A tensor, as it is now: the version counts changes in place."""

    tensor: int
    version: int


def _identity(value: Any) -> Any:
    """What is equal for two arguments that are one: tensors by identity, others by value."""
    if isinstance(value, Tensor):
        return _Same(id(value), -1 if value.is_inference() else value._version)
    if isinstance(value, tuple | list):
        return [_identity(v) for v in value]
    if isinstance(value, dict):
        return {key: _identity(v) for key, v in value.items()}
    plain = value is None or isinstance(value, bool | int | float | str | torch.dtype)
    return value if plain else object()  # equal to nothing


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


def _holds(module: nn.Module, layer: nn.Module) -> bool:
    return any(inner is layer for inner in module.modules())
