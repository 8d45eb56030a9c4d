"""The operators that choose two levels for real-valued weights, with types and documentation.

Rules, per group of weights v, all with ``bit = v > threshold``:

    minmax   levels min and max, the threshold halfway: MLX's rule
    sign     levels ± mean|v|, threshold 0
    mean     levels mean(v) ± mean|v - mean(v)|, the threshold mean(v)
    optimal  the two levels and the threshold of the least squared error, exactly
"""

import torch
from torch import Tensor

from torch_onebit.packing import pack_bits

RULES = ("minmax", "sign", "mean", "optimal")


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


def fake_quantize_backward(grad: Tensor, w: Tensor, rule: str, group_size: int = 128) -> Tensor:
    """The gradient of ``fake_quantize`` for w, given the one for its result; both shaped as w."""
    return torch.ops.onebit.fake_quantize_backward(grad, w, rule, group_size)


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


def quantize_affine(w: Tensor, scales: Tensor, biases: Tensor, group_size: int = 128) -> Tensor:
    """The bits that ``fake_quantize_affine`` takes, packed: they follow from its own results.

    Args:
        w, scales, biases, group_size: as in ``fake_quantize_affine``.
    Returns:
        packed ``[..., k // 32]`` int32.
    Raises:
        ValueError: an argument that is not allowed; the message names it and its value.
    """
    exact = torch.float64 if w.dtype == torch.float64 else torch.float32
    w_hat = torch.ops.onebit.fake_quantize_affine(w, scales, biases, group_size, dtype=exact)
    low = biases.to(exact).unsqueeze(-1)
    return pack_bits((w_hat.unflatten(-1, (-1, group_size)) != low).flatten(-2))


def fake_quantize_affine_backward(
    grad: Tensor, w: Tensor, scales: Tensor, biases: Tensor, group_size: int = 128
) -> tuple[Tensor, Tensor]:
    """The gradients of ``fake_quantize_affine`` for (scales, biases); that of w is grad itself."""
    return torch.ops.onebit.fake_quantize_affine_backward(grad, w, scales, biases, group_size)
