"""A linear layer on 1-bit weights that keeps only latent weights: the autograd function.

Backward makes the 1-bit weights again from the latent ones, one pass over the matrix, instead of
keeping them: between forward and backward a layer holds its input and nothing of its weight's size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_onebit.nested import on_rows
from torch_onebit.ops import (
    fake_quantize,
    fake_quantize_affine,
    fake_quantize_affine_backward,
    fake_quantize_backward,
)
from torch_onebit.padding import fill, fold


class _LatentLinear(torch.autograd.Function):
    """``y = x @ fake_quantize(w).T + bias`` for x ``[m, k]``; scales and biases are free levels."""

    generate_vmap_rule = True  # and no jvp: torch.compile takes no function that has one

    @staticmethod
    def forward(x, w, scales, biases, bias, method, group_size):
        return F.linear(x, binary_weights(w, scales, biases, method, group_size, x.dtype), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, scales, biases, _, ctx.method, ctx.group_size = inputs
        ctx.save_for_backward(x, w, scales, biases)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, w, scales, biases = ctx.saved_tensors
        grad_x = grad_w = grad_scales = grad_biases = grad_bias = None
        if ctx.needs_input_grad[0]:
            options = ctx.method, ctx.group_size, x.dtype
            grad_x = grad @ binary_weights(w, scales, biases, *options)
        if any(ctx.needs_input_grad[1:4]):
            grad_binary = grad.t() @ x
            filled, whole = grad_binary, fill(w, ctx.group_size)
            if whole is not w:  # what fills up the last group met no input
                filled = F.pad(filled, (0, whole.shape[1] - w.shape[1]))
            if scales is None:
                grad_w = fake_quantize_backward(filled, whole, ctx.method, ctx.group_size)
                grad_w = fold(grad_w, w.shape[1], ctx.group_size)
            else:
                grad_w = grad_binary.to(w.dtype)
                grad_scales, grad_biases = fake_quantize_affine_backward(
                    filled, whole, scales, biases, ctx.group_size
                )
        if ctx.needs_input_grad[4]:
            grad_bias = grad.sum(0)
        return grad_x, grad_w, grad_scales, grad_biases, grad_bias, None, None


def binary_weights(
    w: Tensor,
    scales: Tensor | None,
    biases: Tensor | None,
    method: str,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The 1-bit weights of latent ones ``[..., k]`` as floats, with levels by method or free ones;
    differentiable. In the dtype of w without one."""
    whole = fill(w, group_size)
    if scales is None:
        w_hat = fake_quantize(whole, method, group_size, dtype=dtype)
    else:
        w_hat = fake_quantize_affine(whole, scales, biases, group_size, dtype=dtype)
    return w_hat if whole is w else w_hat[..., : w.shape[-1]]


def latent_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    method: str,
    group_size: int,
    scales: Tensor | None = None,
    biases: Tensor | None = None,
) -> Tensor:
    """``x @ w_hat.T + bias`` with w_hat the 1-bit weights of latent w.

    Under autocast x and the product take the region's dtype (float64 keeps its own, as in
    nn.Linear); w and its gradient keep theirs.

    Args:
        x: ``[..., k]``, also nested.
        w: ``[n, k]``, any floating dtype.
        bias: ``[n]`` or None.
        method: of the levels, one of ``ops.RULES``; unused with scales.
        scales, biases: ``[n, groups]``, both or none: levels of their own.
    Returns:
        ``[..., n]`` in the dtype of x, or of the autocast region.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:  # which autocast leaves
        x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return latent_linear(x, w, bias, method, group_size, scales, biases)
    if x.is_nested:
        rest = (w, bias, method, group_size, scales, biases)
        return on_rows(lambda rows: latent_linear(rows, *rest), x)
    bias = None if bias is None else bias.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    y = _LatentLinear.apply(rows, w, scales, biases, bias, method, group_size)
    # Not a view to autograd, as in nn.Linear: y may be changed in place, and FSDP hooks it.
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], w.shape[0]])
