"""PrepackedLinear: OneBitLinear with its weights in the order in which CPU kernels read them."""

import copy
from collections.abc import Callable
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from torch_onebit import ops
from torch_onebit.nn.linear import OneBitLinear
from torch_onebit.nn.ties import TENSORS
from torch_onebit.padding import pad_rows

_swapping = RLock()  # threads may read a layer at once, and reading can swap it


class PrepackedLinear(OneBitLinear):
    """An ``OneBitLinear`` that holds one buffer, ``prepacked``, in place of its weights.

    ``OneBitLinear.prepack`` makes it of a layer and ``unprepack`` takes it back, in place. There is
    one copy of the weights, so none can be stale: ``dequantize``, ``state_dict``, ``canonical`` and
    pickle unpack it for the call, and whatever could change weight, scales or biases makes the
    layer an ``OneBitLinear`` again first: reading, setting or deleting one of them, ``train()``,
    loading, tying, moving to another device, converting to another dtype. Levels are no
    parameters here, so they do not train; gradients of x and of ``bias`` are as usual.
    """

    prepacked: Tensor  # uint8, of ops.prepack
    _levels: tuple[torch.dtype, bool]  # their dtype, and whether there are no biases

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("PrepackedLinear must be made by OneBitLinear.prepack, got a call of it")

    def forward(self, x: Tensor) -> Tensor:
        try:
            prepacked, form = self._buffers["prepacked"], self._form()
        except KeyError:  # another thread has read the weights since this call began
            return OneBitLinear.forward(self, x)
        if self._lacking:
            x = pad_rows(x, self._lacking)
        own = self._parameters
        bias = own["bias"] if "bias" in own else self.bias
        return ops.linear_prepacked_op(x, prepacked, bias, *form)

    def _form(self) -> tuple[int, int, int, torch.dtype, bool]:
        columns, levels = self.in_features + self._lacking, self.__dict__["_levels"]
        return self.out_features, columns, self.group_size, *levels

    def _take_over(self, prepacked: Tensor, dtype: torch.dtype, symmetric: bool) -> None:
        """Be what the OneBitLinear was that has just become one of this class."""
        # New dicts: a copy.copy of the layer has the old ones too.
        parameters = {k: v for k, v in self._parameters.items() if k not in TENSORS}
        buffers = {k: v for k, v in self._buffers.items() if k not in TENSORS}
        self.__dict__.update(
            _levels=(dtype, symmetric),
            _parameters=parameters,
            _buffers={**buffers, "prepacked": prepacked},
            _non_persistent_buffers_set={*self._non_persistent_buffers_set, "prepacked"},
        )

    def canonical(self) -> OneBitLinear:
        """An ``OneBitLinear`` of the same weights, unpacked now, that shares everything else."""
        with _swapping:
            if type(self) is not PrepackedLinear:
                return self
            held, form = dict(self.__dict__), self._form()
        del held["_levels"]
        # Not of inference mode, even if called there: the layer may be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            weight, *levels = ops.unprepack(held["_buffers"]["prepacked"], *form)
            levels = [t if t is None else nn.Parameter(t, requires_grad=False) for t in levels]
        twin = OneBitLinear.__new__(OneBitLinear)
        buffers = {k: v for k, v in held["_buffers"].items() if k != "prepacked"}
        held["_buffers"] = {"weight": weight, **buffers}
        held["_parameters"] = {"scales": levels[0], "biases": levels[1], **held["_parameters"]}
        held["_non_persistent_buffers_set"] = held["_non_persistent_buffers_set"] - {"prepacked"}
        twin.__dict__.update(held)
        return twin

    def prepack(self) -> int:
        return self.prepacked.numel()

    def unprepack(self) -> OneBitLinear:
        """Hold weight, scales and biases again, in place; returns the layer."""
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(msg="reading weights of a PrepackedLinear changes the layer")
        with _swapping:
            if type(self) is PrepackedLinear:
                self.__dict__.update(self.canonical().__dict__)
                self.__class__ = OneBitLinear
                del self.__dict__["_levels"]
        return self

    def dequantize(self) -> Tensor:
        return self.canonical().dequantize()

    @property
    def level_options(self) -> dict[str, Any]:
        return {"device": self.prepacked.device, "dtype": self._levels[0]}

    def train(self, mode: bool = True) -> OneBitLinear:
        return self.unprepack().train() if mode else super().train(False)

    # --- what can change the weights ---

    def __getattr__(self, name: str) -> Any:
        if name in TENSORS:
            return getattr(self.unprepack(), name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in TENSORS:
            setattr(self.unprepack(), name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:  # parametrizations begin with it
        delattr(self.unprepack(), name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OneBitLinear:
        """A move to where it is, in the dtype it has, is none."""
        kept = (torch.empty(0, dtype=self._levels[0]), self.prepacked)
        if all(fn(t) is t for t in kept):
            return super()._apply(fn, recurse)
        return self.unprepack()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unprepack()._load_from_state_dict(*args)

    # --- what sees the layer as an OneBitLinear ---

    def _save_to_state_dict(self, *args: Any) -> None:
        self.canonical()._save_to_state_dict(*args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self.canonical(),)  # the layout is of this version

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrepackedLinear":
        other = memo[id(self)] = PrepackedLinear.__new__(PrepackedLinear)
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other


def _itself(layer: OneBitLinear) -> OneBitLinear:
    """What a pickled layer is restored by."""
    return layer


OneBitLinear.prepacked_form = PrepackedLinear
