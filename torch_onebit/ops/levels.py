"""The operators that choose two levels for real-valued weights, with types and documentation.

Rules, per group of weights v, all with ``bit = v > threshold``:

    minmax   levels min and max, the threshold halfway: MLX's rule
    sign     levels ± mean|v|, threshold 0
    mean     levels mean(v) ± mean|v - mean(v)|, the threshold mean(v)
    optimal  the two levels and the threshold of the least squared error, exactly
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_onebit.checks import check_kind
from torch_onebit.ops.batching import Dims, front, pad, stack_all
from torch_onebit.ops.typed import typed
from torch_onebit.packing import pack_bits

RULES = ("minmax", "sign", "mean", "optimal")


@typed
def quantize_levels(
    w: Tensor, rule: str, group_size: int = 128, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to 1 bit by a rule.

    Args:
        w: ``[..., k]``, float32, float16, bfloat16 or float64; k a multiple of ``group_size``.
        rule: one of ``RULES``.
        group_size: 32, 64 or 128.
        importance: ``[k]`` or as w, not negative: weights of the squared error. Rules "sign" and
            "optimal" only.
    Returns:
        packed ``[..., k // 32]`` int32, scales and biases ``[..., k // group_size]`` in the dtype
        of w.
    Raises:
        ValueError: an argument that is not allowed; the message names it and its value.
    """
    return torch.ops.onebit.quantize_levels(w, rule, group_size, importance)


@typed
def fake_quantize(
    w: Tensor, rule: str, group_size: int = 128, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The 1-bit weights as floats, for training: ``dequantize(*quantize_levels(w, …))``.

    Differentiable in w: straight through for the bit, exact for the levels.

    Args:
        w, rule, group_size: as in ``quantize_levels``.
        dtype: of the result; that of w without it.
    Returns:
        as w.
    Raises:
        ValueError: an argument that is not allowed; the message names it and its value.
    """
    return torch.ops.onebit.fake_quantize(w, rule, group_size, dtype=dtype)


@typed
def fake_quantize_backward(grad: Tensor, w: Tensor, rule: str, group_size: int = 128) -> Tensor:
    """The gradient of ``fake_quantize`` for w, given the one for its result; both shaped as w."""
    return torch.ops.onebit.fake_quantize_backward(grad, w, rule, group_size)


@typed
def fake_quantize_affine(
    w: Tensor,
    scales: Tensor,
    biases: Tensor,
    group_size: int = 128,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """1-bit weights as floats with free levels: each weight takes the nearer of bias, bias + scale.

    Differentiable: straight through for w, exact for scales and biases.

    Args:
        w: ``[..., k]``.
        scales, biases: ``[..., k // group_size]``, one floating dtype.
        group_size: 32, 64 or 128.
        dtype: of the result; that of w without it.
    Returns:
        as w.
    Raises:
        ValueError: an argument that is not allowed; the message names it and its value.
    """
    return torch.ops.onebit.fake_quantize_affine(w, scales, biases, group_size, dtype=dtype)


@typed
def quantize_affine(w: Tensor, scales: Tensor, biases: Tensor, group_size: int = 128) -> Tensor:
    """The bits that ``fake_quantize_affine`` takes, packed: they follow from its own results.

    Args:
        w, scales, biases, group_size: as in ``fake_quantize_affine``.
    Returns:
        packed ``[..., k // 32]`` int32.
    Raises:
        ValueError: an argument that is not allowed; the message names it and its value.
    """
    check_kind("w", w, Tensor, "a tensor")
    check_kind("biases", biases, Tensor, "a tensor")
    exact = torch.float64 if w.dtype == torch.float64 else torch.float32
    w_hat = torch.ops.onebit.fake_quantize_affine(w, scales, biases, group_size, dtype=exact)
    low = biases.to(exact).unsqueeze(-1)
    return pack_bits((w_hat.unflatten(-1, (-1, group_size)) != low).flatten(-2))


@typed
def fake_quantize_affine_backward(
    grad: Tensor, w: Tensor, scales: Tensor, biases: Tensor, group_size: int = 128
) -> tuple[Tensor, Tensor]:
    """The gradients of ``fake_quantize_affine`` for (scales, biases); that of w is grad itself."""
    return torch.ops.onebit.fake_quantize_affine_backward(grad, w, scales, biases, group_size)


def _quantize_levels(
    info: Any,
    in_dims: Dims,
    w: Tensor,
    rule: str,
    group_size: int = 128,
    importance: Tensor | None = None,
) -> tuple[Any, Any]:
    if importance is None:
        return quantize_levels(front(w, in_dims[0]), rule, group_size), (0, 0, 0)
    if in_dims[3] is None and importance.dim() == 1:  # one per column, of every w
        w = front(w, in_dims[0])
    else:
        w, importance = stack_all(info.batch_size, [w, importance], [in_dims[0], in_dims[3]])
        importance = pad(importance, True, w.dim() - 1).expand(w.shape)
    return quantize_levels(w, rule, group_size, importance), (0, 0, 0)


def _rowwise(op: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """The rule of an operator whose rows are independent and whose first arguments are tensors."""

    def rule(info: Any, in_dims: Dims, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        stacked = stack_all(info.batch_size, list(args[:tensors]), list(in_dims[:tensors]))
        result = op(*stacked, *args[tensors:], **kwargs)
        return result, (0,) * len(result) if isinstance(result, tuple) else 0

    return rule


VMAP_RULES = {
    "quantize_levels": _quantize_levels,
    "fake_quantize": _rowwise(fake_quantize, 1),
    "fake_quantize_backward": _rowwise(fake_quantize_backward, 2),
    "fake_quantize_affine": _rowwise(fake_quantize_affine, 3),
    "fake_quantize_affine_backward": _rowwise(fake_quantize_affine_backward, 4),
}
