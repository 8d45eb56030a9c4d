"""OneBitStack: packed matrices of one shape, of which every row of x meets a chosen one."""

import torch
from torch import Tensor

from torch_onebit import ops
from torch_onebit.checks import check_count, check_packed
from torch_onebit.methods import quantize_weight
from torch_onebit.nn.sizes import stored_columns, uniform_std
from torch_onebit.nn.weight import OneBitModule
from torch_onebit.padding import pad_rows


class OneBitStack(OneBitModule):
    """``y[i] = x[rows[i]] @ w[chosen[i]].T`` with w ``[count, n, k]`` packed to one bit per weight.

    ``weight`` is ``[count, n, stored // 32]``, ``scales`` and ``biases``
    ``[count, n, stored // group_size]``; otherwise as in ``OneBitLinear``.

    Args:
        count: how many matrices there are.
        in_features, out_features: k and n of each.
        group_size, symmetric, device, dtype: as in ``OneBitLinear``.
    Raises:
        ValueError: a group size that the format does not allow, or a negative size.
        TypeError: an argument of the wrong kind.
    """

    rows_name, columns_name = "rows", "in_features"

    def __init__(
        self,
        count: int,
        in_features: int,
        out_features: int,
        *,
        group_size: int = 128,
        symmetric: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("count", count)
        check_count("out_features", out_features)
        options = {"group_size": group_size, "symmetric": symmetric}
        super().__init__(count * out_features, in_features, device=device, dtype=dtype, **options)
        self.count = count
        self.in_features = in_features
        self.out_features = out_features
        self.rows = count * out_features
        self._take(self.weight, self.scales, self.biases)
        self._reset_weight(uniform_std(in_features))

    def _take(self, weight: Tensor, scales: Tensor, biases: Tensor | None) -> None:
        """Hold these tensors, the matrices one below the other or stacked."""
        shape = (self.count, self.out_features)
        given = (weight, scales, biases)
        super()._take(*(t if t is None else t.view(*shape, t.shape[-1]) for t in given))

    def forward(
        self,
        x: Tensor,
        chosen: Tensor,
        rows: Tensor | None = None,
        *,
        sorted_indices: bool = False,
    ) -> Tensor:
        """Multiply rows of x by chosen matrices.

        Args:
            x: ``[m, k]``.
            chosen: ``[b]``, int32 or int64: a matrix for every result.
            rows: ``[b]``, the row of x for every result; without it one after the other, b = m.
            sorted_indices: a promise that chosen ascend; only speed depends on it.
        Returns:
            ``[b, n]`` in the dtype of x.
        """
        if self._lacking:
            x = pad_rows(x, self._lacking)
        y = ops.gather_qmm(
            x.unsqueeze(-2),
            self.weight,
            self.scales,
            self.biases,
            rows,
            chosen,
            self.group_size,
            sorted_indices=sorted_indices,
        )
        return y.squeeze(-2)

    @classmethod
    def from_weight(
        cls, w: Tensor, *, group_size: int = 128, symmetric: bool = False, method: str = "optimal"
    ) -> "OneBitStack":
        """Quantize matrices ``[count, n, k]``; arguments as in ``OneBitLinear.from_linear``."""
        count, n, k = w.shape
        packed = quantize_weight(w.flatten(0, 1), method, group_size, symmetric=symmetric)
        options = {"group_size": group_size, "symmetric": symmetric, "device": "meta"}
        stack = cls(count, k, n, **options)
        stack._take(*packed)
        return stack

    @classmethod
    def from_packed(
        cls,
        weight: Tensor,
        scales: Tensor,
        biases: Tensor | None,
        *,
        group_size: int,
        in_features: int | None = None,
    ) -> "OneBitStack":
        """A stack that holds tensors of the format, as they are: nothing is copied.

        Args:
            weight: ``[count, n, k // 32]``, int32 or uint32.
            scales, biases: ``[count, n, k // group_size]``; biases are None in the symmetric form.
            in_features: k, when the last group is not full; all columns without it.
        Raises:
            ValueError: a tensor that the format does not allow; the message names it.
            TypeError: something else than a tensor.
        """
        if isinstance(weight, Tensor) and weight.dim() != 3:
            raise ValueError(f"weight must have 3 dimensions, got {weight.dim()}")
        flat = [t.flatten(0, -2) if isinstance(t, Tensor) else t for t in (weight, scales, biases)]
        check_packed(*flat, group_size)
        k = stored_columns(flat[0], group_size, "in_features", in_features)
        count, n, _ = weight.shape
        options = {"group_size": group_size, "symmetric": biases is None, "device": "meta"}
        stack = cls(count, k, n, **options)
        stack._take(*flat)
        return stack

    def dequantize(self) -> Tensor:
        """The weights ``[count, n, k]`` in the dtype of scales."""
        w = ops.dequantize(self.weight, self.scales, self.biases, self.group_size)
        return w[..., : self.in_features].contiguous()

    def extra_repr(self) -> str:
        return (
            f"count={self.count}, in_features={self.in_features}, "
            f"out_features={self.out_features}, group_size={self.group_size}, "
            f"symmetric={self.symmetric}"
        )
