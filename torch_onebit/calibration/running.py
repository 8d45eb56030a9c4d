"""Running a model up to some of its layers and seeing what they are given and give."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_onebit.calibration.batches import Call
from torch_onebit.linear_algebra import narrow
from torch_onebit.nn import OneBitLinear

# (name, input, output, residual) of one call of a layer, valid until the callback returns. The
# residual is what the output is added to, None when the next thing done to it is something else.
OnCall = Callable[[str, Tensor, Tensor, Tensor | None], None]


class Reached(Exception):
    """Stops a forward pass that has gone far enough."""


@torch.no_grad()
def run(module: nn.Module, call: Call) -> Any:
    """module on one call, whose tensors it may change in place."""
    args, kwargs = call
    return module(
        *(_own(value) for value in args), **{key: _own(value) for key, value in kwargs.items()}
    )


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def calls_of(module: nn.Module, inner: nn.Module, count: int, call: Call) -> list[Call]:
    """The first so many calls of a module inside, when module runs."""
    calls: list[Call] = []

    def hook(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        if len(calls) == count:
            raise Reached

    handle = inner.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run(module, call)
    except Reached:
        pass
    finally:
        handle.remove()
    return calls


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The x of a call of a linear layer, or of experts."""
    return args[0] if args else kwargs["input" if "input" in kwargs else "hidden_states"]


def watch(
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    counts: Mapping[str, int],
    call: Call,
    on_call: OnCall,
    through: bool = False,
) -> Any:
    """Run module until every layer has been called as often as counts says.

    Returns what the module returns if it came to its end, as it always does with ``through``.
    """
    mode = _NextAddition(on_call, -1 if through else sum(counts.values()))
    handles = []
    for name, layer in layers.items():

        def hook(
            layer: nn.Module, args: Any, kwargs: Any, output: Tensor, name: str = name
        ) -> None:
            mode.called(name, input_of(args, kwargs), output)

        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        with mode:
            result = run(module, call)
        mode.settle(None)
        return result
    except Reached:
        return None
    finally:
        for handle in handles:
            handle.remove()


class _NextAddition(TorchFunctionMode):
    """Reports a layer's call at the first operation that makes something of its output."""

    def __init__(self, on_call: OnCall, count: int) -> None:
        super().__init__()
        self.on_call, self.count = on_call, count
        self.pending: tuple[str, Tensor, Tensor] | None = None

    def called(self, name: str, x: Tensor, output: Tensor) -> None:
        self.settle(None)
        self.pending = name, x, output

    def settle(self, residual: Tensor | None) -> None:
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        with torch.no_grad():
            self.on_call(*pending, residual)
        self.count -= 1
        if self.count == 0:
            raise Reached

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.pending is None:
            return function(*args, **kwargs)
        output = self.pending[2]
        if function in _ADDITIONS and not kwargs and len(args) == 2:
            others = [t for t in args if t is not output and isinstance(t, Tensor)]
            if len(others) == 1 and others[0].shape == output.shape:
                self.settle(others[0])
        if _writes(function, kwargs):
            self.settle(None)  # before input or output change
        result = function(*args, **kwargs)
        # Dropout in eval mode and a look at the shape make nothing of it.
        if isinstance(result, Tensor) and result is not output:
            self.settle(None)
        return result


def _writes(function: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a torch function changes a tensor it is given, by the names PyTorch gives those."""
    name = getattr(function, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name.startswith(("__i", "__set")) or "out" in kwargs


_ADDITIONS = {
    torch.add,
    Tensor.add,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.add_,
    Tensor.__iadd__,
}


class Replay:
    """Outputs of layers that will give them again: they are handed out instead of computed.

    Args:
        limit: bytes that may be kept; what does not fit is computed again.
    """

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.outputs: dict[tuple[str, int], Tensor] = {}  # of a layer in a batch

    def forget(self, names: set[str]) -> None:
        for key in [key for key in self.outputs if key[0] in names]:
            output = self.outputs.pop(key)
            self.left += output.numel() * output.element_size()

    def clear(self) -> None:
        self.forget({name for name, _ in self.outputs})

    @contextlib.contextmanager
    def through(self, layers: Mapping[str, nn.Module], batch: int) -> Iterator[None]:
        """Hand out, or keep, the outputs of layers that are called once in this batch."""
        with _forwards(
            {
                layer: functools.partial(self._forward, name, batch, layer.forward)
                for name, layer in layers.items()
            }
        ):
            yield

    def _forward(self, name: str, batch: int, forward: Any, *args: Any, **kwargs: Any) -> Tensor:
        if (name, batch) in self.outputs:
            return self.outputs[name, batch].clone()  # the model may change it in place
        output = forward(*args, **kwargs)
        size = output.numel() * output.element_size()
        if size <= self.left:
            self.left -= size
            self.outputs[name, batch] = output.clone()
        return output


@contextlib.contextmanager
def standing_in(outputs: Mapping[nn.Module, Iterator[Tensor | None]]) -> Iterator[None]:
    """Layers give these outputs, call by call, where their inputs are what matters. What does not
    fit an input, or is None, is computed."""

    def forward(outputs: Iterator[Tensor | None], compute: Any, *args: Any, **kwargs: Any) -> Any:
        output, x = next(outputs, None), input_of(args, kwargs)
        fits = output is not None and output.shape[:-1] == x.shape[:-1]
        return output if fits else compute(*args, **kwargs)

    with _forwards(
        {
            layer: functools.partial(forward, values, layer.forward)
            for layer, values in outputs.items()
        }
    ):
        yield


@contextlib.contextmanager
def _forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Layers run these instead of what they run."""
    before = {layer: vars(layer).get("forward") for layer in forwards}
    for layer, forward in forwards.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer, forward in before.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward


def multiply_in_bfloat16(model: nn.Module) -> None:
    """Let every nn.Linear and OneBitLinear in a model do so where that is faster, from now on."""
    for layer in model.modules():
        if type(layer) in (nn.Linear, OneBitLinear):
            layer.forward = functools.partial(_linear_in_bfloat16, layer)


def _linear_in_bfloat16(layer: nn.Linear | OneBitLinear, input: Tensor) -> Tensor:
    x = narrow(input.reshape(input.shape[:-1].numel(), input.shape[-1]))
    if layer.weight.dtype not in (torch.float32, torch.int32) or x.dtype == input.dtype:
        return type(layer).forward(layer, input)
    weight = layer.dequantize() if isinstance(layer, OneBitLinear) else layer.weight
    bias = None if layer.bias is None else layer.bias.bfloat16()
    y = nn.functional.linear(x, weight.bfloat16(), bias).float()
    return y.view(*input.shape[:-1], layer.out_features)
