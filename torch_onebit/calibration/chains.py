"""Reaching a layer without running everything before it again.

Most deep models are chains: blocks that run one after another, each on what the one before it
returned. Reaching a layer then takes the block that holds it and the inputs of that block, which
are those of the block before, run once more with its layers as they are by now.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from torch_onebit.calibration.batches import Call
from torch_onebit.calibration.running import calls_of, run

Route = tuple[tuple[str, int], ...]  # (chain, block of it), outermost first


def containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What may be a chain, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            yield name, module


class BlockRun:
    """One run of a block: which arguments and result. Keeps them: identities stay unique."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kept = [args, kwargs]
        self.hidden = identity(args[0]) if args else None
        self.others = identity((args[1:], kwargs))
        self.result: Any = None

    def end(self, output: Any) -> None:
        self.kept.append(output)
        self.result = identity(_hidden(output))

    def leads_to(self, following: "BlockRun") -> bool:
        return (
            isinstance(self.hidden, _Same)
            and isinstance(self.result, _Same)
            and self.result == following.hidden
            and self.others == following.others
        )


def is_chain(runs: list[list[BlockRun]]) -> bool:
    """Whether blocks that ran like this are a chain.

    In a chain every block runs once, on the very tensor that the block before it returned (first,
    or alone) as its first argument, and on the same other arguments: tensors that nothing changes,
    numbers, strings, None and containers of these. A cache of keys and values is none of these.
    """
    return all(len(run) == 1 for run in runs) and all(
        first.leads_to(second) for (first,), (second,) in pairwise(runs)
    )


@dataclass(frozen=True)
class _Same:
    """A tensor, as it is now: the version counts changes in place."""

    tensor: int
    version: int


def identity(value: Any) -> Any:
    """What is equal for two arguments that are one: tensors by identity, others by value."""
    if isinstance(value, Tensor):
        return _Same(id(value), -1 if value.is_inference() else value._version)
    if isinstance(value, tuple | list):
        return [identity(v) for v in value]
    if isinstance(value, dict):
        return {key: identity(v) for key, v in value.items()}
    plain = value is None or isinstance(value, bool | int | float | str | torch.dtype)
    return value if plain else object()  # equal to nothing


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


def _inputs_of(module: nn.Module, block: nn.Module, call: Call) -> Call:
    """What block is called with when module runs."""
    return calls_of(module, block, 1, call)[0]


@dataclass
class _Stage:
    """A chain that is being walked: the block reached so far and its inputs."""

    chain: str
    index: int
    calls: list[Call]

    def hand_on(self, i: int, result: Any) -> None:
        """What the block returned for call i is what the next one gets."""
        (_, *others), kwargs = self.calls[i]
        self.calls[i] = (_hidden(result), *others), kwargs


class Passes:
    """The shortest way to the layers of a module, over some calls of it.

    Memory: per call, the inputs of one block; where a block contains a chain itself, of one more.

    Args:
        module: the model; its layers may be replaced between two calls of ``reach``.
        calls: what it is run on.
        runner: ``runner(block, i, call)`` runs a block on what call i became.
    """

    def __init__(
        self,
        module: nn.Module,
        calls: list[Call],
        runner: Callable[[nn.Module, int, Call], Any] = lambda block, i, call: run(block, call),
    ) -> None:
        self.module, self.calls, self.runner = module, calls, runner
        self.stages: list[_Stage] = []

    def reach(self, route: Route) -> tuple[nn.Module, list[Call]]:
        """(module, calls): running this module on these calls gets to the end of the route."""
        module, calls = self.module, self.calls
        for depth, (name, index) in enumerate(route):
            chain = self.module.get_submodule(name)
            stage = self.stages[depth] if depth < len(self.stages) else None
            if stage is None or stage.chain != name or stage.index > index:
                inputs = [_inputs_of(module, chain[0], call) for call in calls]
                stage = _Stage(name, 0, inputs)
                self.stages[depth:] = [stage]
            while stage.index < index:
                self._advance(stage, chain[stage.index])
                del self.stages[depth + 1 :]
            module, calls = chain[index], stage.calls
        del self.stages[len(route) :]
        return module, calls

    def _advance(self, stage: _Stage, block: nn.Module) -> None:
        for i, call in enumerate(stage.calls):  # one at a time: the old inputs go
            stage.hand_on(i, self.runner(block, i, call))
        stage.index += 1

    def hand_on(self, results: Iterable[Any]) -> None:
        """Take what the block that was reached last returned, call by call: it has been run."""
        stage = self.stages[-1]
        for i, result in enumerate(results):
            stage.hand_on(i, result)
        stage.index += 1

    def changed(self, route: Route) -> None:
        """A layer there is another one now: forget inputs that may depend on it."""
        for depth, stage in enumerate(self.stages):
            here = route[depth : depth + 1]
            if not here or here[0][0] != stage.chain or here[0][1] < stage.index:
                del self.stages[depth:]
                return
