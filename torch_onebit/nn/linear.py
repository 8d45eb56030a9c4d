"""OneBitLinear: nn.Linear over packed weights."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from torch_onebit import ops
from torch_onebit.checks import check_kind, check_packed
from torch_onebit.float_layers import is_conv1d, matrix
from torch_onebit.mapped import release_pages
from torch_onebit.methods import quantize_weight
from torch_onebit.nn.sizes import stored_columns, uniform_std
from torch_onebit.nn.weight import OneBitModule
from torch_onebit.ops import linear_op
from torch_onebit.padding import pad_rows


class OneBitLinear(OneBitModule):
    """``y = x @ w.T + bias`` with w packed to one bit per weight; a drop-in for ``nn.Linear``.

    Args:
        in_features: k; where ``group_size`` does not divide it, the last group is filled up.
        out_features: n.
        bias: whether there is a ``bias`` ``[n]``, trainable as in ``nn.Linear``.
        group_size: weights that share a scale: 32, 64 or 128.
        symmetric: store no ``biases``; weights are ``±scales / 2``.
        device, dtype: of scales, biases and bias; ``weight`` is int32 always.
    Shape:
        x ``[..., k]`` to y ``[..., n]`` in the dtype of x.
    Raises:
        ValueError: a group size that the format does not allow, or a negative size.
        TypeError: an argument of the wrong kind.
    """

    rows_name, columns_name = "out_features", "in_features"
    prepacked_form: ClassVar[type["OneBitLinear"]]  # set where it is defined, prepacked.py

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        symmetric: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            out_features,
            in_features,
            group_size=group_size,
            symmetric=symmetric,
            device=device,
            dtype=dtype,
        )
        self.in_features = in_features
        self.out_features = out_features
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random bits of the standard deviation nn.Linear starts with."""
        self._reset_weight(uniform_std(self.in_features))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if self._lacking:
            x = pad_rows(x, self._lacking)
        own = self._parameters
        try:  # a third of the time of nn.Module's attributes, 1.3 us a call
            weight, bias = self._buffers["weight"], own["bias"]
            scales, biases = own["scales"], own["biases"]
        except KeyError:  # parametrized
            weight, bias, scales, biases = self.weight, self.bias, self.scales, self.biases
        return linear_op(x, weight, scales, biases, bias, self.group_size)

    def prepack(self) -> int:
        """Hold the weights in the order in which kernels of the CPU read them, and in no other.

        For inference. The layer becomes a ``PrepackedLinear`` in place, with one buffer for weight,
        scales and biases, and an ``OneBitLinear`` again before anything can change those.

        Returns:
            its bytes: those of the weights with ``out_features`` rounded up to 64, and a header.
        Raises:
            NotImplementedError: not on the CPU, or kernels that do not read it (all but avx512).
            ValueError: levels that are float64 or require grad, or weights tied to another layer's.
            TypeError: a subclass, or a layer with parametrizations or another forward.
        """
        self.check_prepackable()
        with torch.inference_mode(False), torch.no_grad():
            prepacked = ops.prepack(self.weight, self.scales, self.biases, self.group_size)
        replaced = [t for t in (self.weight, self.scales, self.biases) if t is not None]
        levels = self.scales.dtype, self.biases is None
        self.__class__ = self.prepacked_form
        self._take_over(prepacked, *levels)
        for tensor in replaced:  # where they mirror a file, that keeps them
            release_pages(tensor)
        return prepacked.numel()

    def check_prepackable(self) -> None:
        """Raise what ``prepack`` would raise."""
        if type(self) is not OneBitLinear:
            raise TypeError(f"the layer must be an OneBitLinear itself, got {type(self).__name__}")
        if "forward" in vars(self):  # it would go on reading the weights
            raise TypeError(
                "forward must be the layer's own to be prepacked, got another in its place"
            )
        if self._tie is not None:
            raise ValueError("weight must be of this layer alone to be prepacked, got a tied one")
        if hasattr(self.weight, "placements"):
            raise ValueError("weight must be of one device to be prepacked, got a DTensor")
        if any(t is not None and t.requires_grad for t in (self.scales, self.biases)):
            raise ValueError("scales and biases must not require grad to be prepacked, got some do")
        dtype, device = self.scales.dtype, self.weight.device.type
        if dtype == torch.float64:
            raise ValueError(f"scales must have at most 32 bits to be prepacked, got {dtype}")
        if device != "cpu":
            raise NotImplementedError(f"weight must be on the CPU to be prepacked, got {device}")
        if not ops.can_prepack():
            raise NotImplementedError(
                f"prepacked weights must have kernels (avx512), got {ops.cpu_isa()} ones"
            )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        group_size: int = 128,
        symmetric: bool = False,
        method: str = "optimal",
        importance: Tensor | None = None,
        moments: Tensor | None = None,
    ) -> "OneBitLinear":
        """Quantize an ``nn.Linear``; its ``bias`` parameter is taken over, not copied.

        GPT-2's ``Conv1D`` of transformers, whose weight is the transpose, is taken too.

        Args:
            method, importance, moments: as in ``quantize_weight``. "minmax" gives MLX's bits, for
                weights that are already binary; "calibrated" needs moments.
        Raises:
            ValueError: a group size that the format does not allow, or a method that does not
                exist or lacks what it needs.
            TypeError: another kind of layer.
        """
        if not is_conv1d(linear):
            check_kind("linear", linear, nn.Linear, "an nn.Linear")
        w = matrix(linear)
        packed = quantize_weight(
            w,
            method,
            group_size,
            symmetric=symmetric,
            importance=importance,
            moments=moments,
        )
        layer = cls.from_packed(*packed, linear.bias, group_size=group_size, in_features=w.shape[1])
        return layer.train(linear.training)

    @classmethod
    def from_packed(
        cls,
        weight: Tensor,
        scales: Tensor,
        biases: Tensor | None,
        bias: Tensor | None = None,
        *,
        group_size: int,
        in_features: int | None = None,
    ) -> "OneBitLinear":
        """A layer that holds tensors of the format, as they are: nothing is copied.

        Args:
            weight: ``[n, k // 32]``, int32 or uint32 (viewed as int32).
            scales, biases: ``[n, k // group_size]``, one floating dtype; biases are None for the
                symmetric form.
            bias: ``[n]``; a Parameter is taken over, another tensor becomes one.
            group_size: 32, 64 or 128.
            in_features: k, when the last group is not full; all columns without it.
        Raises:
            ValueError: a tensor that the format does not allow; the message names it.
            TypeError: something else than a tensor.
        """
        check_packed(weight, scales, biases, group_size)
        k = stored_columns(weight, group_size, "in_features", in_features)
        n = len(weight)
        options = {"group_size": group_size, "symmetric": biases is None, "device": "meta"}
        layer = cls(k, n, bias=False, **options)
        layer._take(weight, scales, biases)
        if bias is not None:
            if list(bias.shape) != [n]:
                raise ValueError(f"bias must have shape {[n]}, got {list(bias.shape)}")
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` of the dequantized weights; ``bias`` is taken over, not copied."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize().detach())
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, group_size={self.group_size}, "
            f"symmetric={self.symmetric}"
        )
