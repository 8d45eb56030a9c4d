"""torch.vmap rules: every operator stays one call, whatever of it is batched.

A rule gets arguments of which some carry an extra dimension (``in_dims``), and returns the result
with the extra dimension in front.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_onebit import level_ops, ops

Dims = tuple[int | None, ...]


def register() -> None:
    """Tell torch.vmap about the operators."""
    for name, rule in _RULES.items():
        torch.library.register_vmap(f"onebit::{name}", rule)


def _front(t: Tensor | None, dim: int | None) -> Tensor | None:
    return t if t is None or dim is None else t.movedim(dim, 0)


def _stack_all(size: int, tensors: list[Tensor | None], dims: list[int | None]) -> list:
    """All tensors with the extra dimension in front, expanded where they had none."""
    return [
        t if t is None else (t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0))
        for t, dim in zip(tensors, dims, strict=True)
    ]


def _pad(t: Tensor, batched: bool, rank: int) -> Tensor:
    """Leading dimensions of size 1, after the extra one, up to ``rank`` dimensions without it."""
    own = t.dim() - batched
    shape = [1] * (rank - own)
    return t.reshape(*t.shape[:batched], *shape, *t.shape[batched:])


def _quantize(info: Any, in_dims: Dims, w: Tensor, group_size: int) -> tuple[Any, Any]:
    return ops.quantize(_front(w, in_dims[0]), group_size), (0, 0, 0)


def _dequantize(
    info: Any, in_dims: Dims, packed: Tensor, scales: Tensor, biases: Tensor | None, group_size: int
) -> tuple[Tensor, int]:
    weights = _stack_all(info.batch_size, [packed, scales, biases], list(in_dims[:3]))
    return ops.dequantize(*weights, group_size), 0


def _qmm(
    info: Any,
    in_dims: Dims,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None,
    group_size: int,
    transpose: bool = True,
) -> tuple[Tensor, int]:
    x_dim, *weight_dims = in_dims[:4]
    x = _front(x, x_dim)
    stacked = any(dim is not None for dim in weight_dims)
    vector = x.dim() - (x_dim is not None) == 1
    if not stacked and packed.dim() == 2:  # x alone: its rows fold
        return ops.qmm(x, packed, scales, biases, group_size, transpose), 0
    weights: list[Tensor | None] = [packed, scales, biases]
    if stacked:
        weights = _stack_all(info.batch_size, weights, weight_dims)
    if vector:
        x = x.unsqueeze(-2)
    rank = max(x.dim() - (x_dim is not None), weights[0].dim() - stacked)
    x = _pad(x, x_dim is not None, rank)
    weights = [t if t is None else _pad(t, stacked, rank) for t in weights]
    y = ops.qmm(x, *weights, group_size, transpose)
    return (y.squeeze(-2) if vector else y), 0


def _indices(
    info: Any, source: Tensor, source_batched: bool, indices: Tensor | None, dim: int | None
) -> Tensor:
    """Explicit indices ``[1 or batch, ...]`` into the matrices of source, the extra dimension among
    them when it is batched."""
    lead = source.shape[source_batched:-2]
    count = lead.numel()
    if indices is None:
        indices = torch.arange(count, device=source.device).view(1, *lead)
    else:
        indices = indices.unsqueeze(0) if dim is None else indices.movedim(dim, 0)
    if source_batched:
        offset = torch.arange(info.batch_size, device=source.device) * count
        indices = indices + offset.view(-1, *[1] * (indices.dim() - 1))
    return indices


def _gathered(
    info: Any,
    x: Tensor,
    x_batched: bool,
    packed: Tensor,
    packed_batched: bool,
    lhs: tuple[Tensor | None, int | None],
    rhs: tuple[Tensor | None, int | None],
) -> tuple[Tensor, Tensor]:
    """lhs and rhs indices ``[batch, ...]`` of one product that holds all those of the batch."""
    left = _indices(info, x, x_batched, *lhs)
    right = _indices(info, packed, packed_batched, *rhs)
    shape = torch.broadcast_shapes(left.shape[1:], right.shape[1:])
    return tuple(_pad(t, True, len(shape)).expand(info.batch_size, *shape) for t in (left, right))


def _gather_qmm(
    info: Any,
    in_dims: Dims,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None,
    lhs_indices: Tensor | None,
    rhs_indices: Tensor | None,
    group_size: int,
    transpose: bool = True,
    sorted_indices: bool = False,
) -> tuple[Tensor, int]:
    x_dim, *weight_dims = in_dims[:4]
    x = _front(x, x_dim)
    weights: list[Tensor | None] = [packed, scales, biases]
    stacked = any(dim is not None for dim in weight_dims)
    if stacked:
        weights = _stack_all(info.batch_size, weights, weight_dims)
    lhs, rhs = _gathered(
        info,
        x,
        x_dim is not None,
        weights[0],
        stacked,
        (lhs_indices, in_dims[4]),
        (rhs_indices, in_dims[5]),
    )
    return ops.gather_qmm(x, *weights, lhs, rhs, group_size, transpose), 0


def _embedding(
    info: Any,
    in_dims: Dims,
    indices: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None,
    group_size: int,
) -> tuple[Tensor, int]:
    indices = _front(indices, in_dims[0])
    if all(dim is None for dim in in_dims[1:4]):
        return ops.embedding(indices, packed, scales, biases, group_size), 0
    weights = _stack_all(info.batch_size, [packed, scales, biases], list(in_dims[1:4]))
    rows = weights[0].shape[1]
    if in_dims[0] is None:
        indices = indices.expand(info.batch_size, *indices.shape)
    offset = torch.arange(info.batch_size, device=indices.device) * rows
    indices = indices + offset.view(-1, *[1] * (indices.dim() - 1))
    flat = [t if t is None else t.flatten(0, 1) for t in weights]
    return ops.embedding(indices, *flat, group_size), 0


def _affine_grad(
    info: Any,
    in_dims: Dims,
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    lhs_indices: Tensor | None,
    rhs_indices: Tensor | None,
    group_size: int,
    transpose: bool = True,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    grad, x, packed = _stack_all(info.batch_size, [grad, x, packed], list(in_dims[:3]))
    if lhs_indices is not None or rhs_indices is not None:
        lhs, rhs = _gathered(
            info, x, True, packed, True, (lhs_indices, in_dims[3]), (rhs_indices, in_dims[4])
        )
        return ops.affine_grad(grad, x, packed, lhs, rhs, group_size, transpose), (0, 0)
    if packed.dim() == 3:  # one matrix each: the rows of x fold
        x, grad = (t.reshape(info.batch_size, -1, t.shape[-1]) for t in (x, grad))
    elif x.dim() == 2:  # a vector each, for a stack of matrices
        x, grad = x.unsqueeze(-2), grad.unsqueeze(-2)
    lead = packed.dim()
    rank = max(x.dim(), lead) - 1
    x, padded = _pad(x, True, rank), _pad(packed, True, rank)
    sums = ops.affine_grad(grad, x, padded, None, None, group_size, transpose)
    return tuple(t.reshape(*packed.shape[:-1], t.shape[-1]) for t in sums), (0, 0)


def _qmm_prepacked(
    info: Any,
    in_dims: Dims,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None,
    prepacked: Tensor,
    group_size: int,
) -> tuple[Tensor, int]:
    return _qmm(info, in_dims, x, packed, scales, biases, group_size)


def _quantize_levels(
    info: Any,
    in_dims: Dims,
    w: Tensor,
    rule: str,
    group_size: int,
    importance: Tensor | None = None,
) -> tuple[Any, Any]:
    if importance is None:
        return level_ops.quantize_levels(_front(w, in_dims[0]), rule, group_size), (0, 0, 0)
    if in_dims[3] is None and importance.dim() == 1:  # one per column, of every w
        w = _front(w, in_dims[0])
    else:
        w, importance = _stack_all(info.batch_size, [w, importance], [in_dims[0], in_dims[3]])
        importance = _pad(importance, True, w.dim() - 1).expand(w.shape)
    return level_ops.quantize_levels(w, rule, group_size, importance), (0, 0, 0)


def _rowwise(op: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """The rule of an operator whose rows are independent and whose first arguments are tensors."""

    def rule(info: Any, in_dims: Dims, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        stacked = _stack_all(info.batch_size, list(args[:tensors]), list(in_dims[:tensors]))
        result = op(*stacked, *args[tensors:], **kwargs)
        return result, (0,) * len(result) if isinstance(result, tuple) else 0

    return rule


_RULES: dict[str, Callable[..., Any]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "qmm": _qmm,
    "qmm_prepacked": _qmm_prepacked,
    "gather_qmm": _gather_qmm,
    "embedding": _embedding,
    "affine_grad": _affine_grad,
    "quantize_levels": _quantize_levels,
    "fake_quantize": _rowwise(level_ops.fake_quantize, 1),
    "fake_quantize_backward": _rowwise(level_ops.fake_quantize_backward, 2),
    "fake_quantize_affine": _rowwise(level_ops.fake_quantize_affine, 3),
    "fake_quantize_affine_backward": _rowwise(level_ops.fake_quantize_affine_backward, 4),
}
