"""Products with 1-bit weights and their gradient."""

from typing import Any

import torch
from torch import Tensor

from torch_onebit.ops.batching import Dims, front, pad, stack_all
from torch_onebit.ops.typed import typed

# Without the call of a Python function, for modules.
linear_op = torch.ops.onebit.linear
linear_prepacked_op = torch.ops.onebit.linear_prepacked
# Whether the kernels chosen now, of which the other is the name, read prepacked weights.
can_prepack, cpu_isa = torch.ops.onebit.can_prepack, torch.ops.onebit.cpu_isa


@typed
def qmm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    group_size: int = 128,
    transpose: bool = True,
) -> Tensor:
    """Multiply x by a 1-bit matrix without unpacking it.

    ``y = x @ w.T`` with w ``[n, k]``, or ``y = x @ w`` with w ``[k, n]`` when ``transpose`` is
    false. Sums are float32 (float64 for float64 x). Differentiable in x, scales and biases, twice.

    Args:
        x: ``[..., k]``, any floating dtype.
        packed: ``[n, k // 32]`` (``[k, n // 32]`` when ``transpose`` is false), int32 or uint32.
            Leading dimensions broadcast against those of x as in ``torch.matmul``.
        scales, biases: as packed with ``group_size // 32`` words to a group, any floating dtype.
            Without biases they are ``-scales / 2``.
        group_size: 32, 64 or 128.
    Returns:
        ``[..., n]`` in the dtype of x.
    Raises:
        ValueError: an argument that the format does not allow; the message names it and its value.
    """
    return torch.ops.onebit.qmm(x, packed, scales, biases, group_size, transpose)


@typed
def linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 128,
) -> Tensor:
    """``y = x @ w.T + bias``: what ``OneBitLinear`` computes.

    Args:
        x, packed, scales, biases, group_size: as in ``qmm``.
        bias: ``[n]``, any floating dtype; it is added in the dtype of x.
    Returns:
        ``[..., n]`` in the dtype of x.
    Raises:
        ValueError: an argument that the format does not allow; the message names it and its value.
    """
    return linear_op(x, packed, scales, biases, bias, group_size)


@typed
def prepack(
    packed: Tensor, scales: Tensor, biases: Tensor | None = None, group_size: int = 128
) -> Tensor:
    """A matrix of weights in the order in which kernels of the CPU read them.

    Args:
        packed: ``[n, k // 32]``, int32 or uint32.
        scales, biases: ``[n, k // group_size]``, float32, float16 or bfloat16.
    Returns:
        uint8 vector: a header of 64 bytes, and the bytes of the weights with n rounded up to 64.
        Other versions of this library may have another layout; they refuse this one.
    Raises:
        ValueError: an argument that the format does not allow; the message names it and its value.
        NotImplementedError: not on the CPU.
    """
    return torch.ops.onebit.prepack(packed, scales, biases, group_size)


@typed
def unprepack(
    prepacked: Tensor,
    rows: int,
    columns: int,
    group_size: int = 128,
    dtype: torch.dtype = torch.float32,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The packed, scales and biases that ``prepack`` was given, copied.

    Args:
        prepacked: what ``prepack`` made of packed ``[rows, columns // 32]``.
        dtype: of scales and biases.
        symmetric: whether there were no biases.
    Raises:
        ValueError: bytes of something else; the message says of what they should be.
    """
    packed, scales, biases = torch.ops.onebit.unprepack(
        prepacked, rows, columns, group_size, dtype, symmetric
    )
    return packed, scales, None if symmetric else biases


@typed
def qmm_prepacked(
    x: Tensor,
    prepacked: Tensor,
    rows: int,
    columns: int,
    group_size: int = 128,
    dtype: torch.dtype = torch.float32,
    symmetric: bool = False,
) -> Tensor:
    """``qmm`` with prepacked weights; differentiable in x.

    Args:
        x: ``[..., columns]``, any floating dtype.
        prepacked, rows, columns, group_size, dtype, symmetric: as in ``unprepack``. Where the
            kernels of this machine cannot read prepacked weights, and for float64 x, they are
            unpacked for the call.
    Returns:
        ``[..., rows]`` in the dtype of x.
    Raises:
        ValueError: an argument that is not legal; the message names it and its value.
    """
    return torch.ops.onebit.qmm_prepacked(x, prepacked, rows, columns, group_size, dtype, symmetric)


@typed
def gather_qmm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    lhs_indices: Tensor | None = None,
    rhs_indices: Tensor | None = None,
    group_size: int = 128,
    transpose: bool = True,
    sorted_indices: bool = False,
) -> Tensor:
    """Multiply chosen matrices of x by chosen 1-bit matrices: a mixture of experts, packed.

    ``y[b] = x[lhs_indices[b]] @ w[rhs_indices[b]].T``. The leading dimensions of x and of packed
    count their matrices in row-major order; an index that is absent counts them one by one. The two
    indices broadcast against each other.

    Args:
        x: ``[..., m, k]``, any floating dtype.
        packed: ``[..., n, k // 32]`` (``[..., k, n // 32]`` when ``transpose`` is false).
        scales, biases: as packed with ``group_size // 32`` words to a group; see ``qmm``.
        lhs_indices, rhs_indices: int32 or int64, any shapes that broadcast to ``batch``.
        sorted_indices: a promise that ``rhs_indices`` ascend; only speed depends on it.
    Returns:
        ``[*batch, m, n]`` in the dtype of x.
    Raises:
        ValueError: an argument that the format does not allow; the message names it and its value.
        IndexError: an index outside the matrices there are.
    """
    return torch.ops.onebit.gather_qmm(
        x,
        packed,
        scales,
        biases,
        lhs_indices,
        rhs_indices,
        group_size,
        transpose,
        sorted_indices,
    )


@typed
def affine_grad(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    lhs_indices: Tensor | None = None,
    rhs_indices: Tensor | None = None,
    group_size: int = 128,
    transpose: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of scales and biases of a product, without the dense gradient of the weights.

    With ``dw = grad.T @ x``: the sums of dw over each group where the bit is set, and over the
    whole group. In the symmetric form the gradient of scales is the first minus half the second.

    Args:
        grad: the gradient of the product's result, in its shape and dtype.
        x, packed, lhs_indices, rhs_indices, group_size, transpose: as given to ``gather_qmm``, or
            to ``qmm`` when there is no index.
    Returns:
        grad_scales, grad_biases: in the shape of scales; float32 (float64 for float64 x).
    Raises:
        ValueError: an argument that the format does not allow; the message names it and its value.
        IndexError: an index outside the matrices there are.
    """
    return torch.ops.onebit.affine_grad(
        grad, x, packed, lhs_indices, rhs_indices, group_size, transpose
    )


def _qmm(
    info: Any,
    in_dims: Dims,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None,
    group_size: int = 128,
    transpose: bool = True,
) -> tuple[Tensor, int]:
    x_dim, *weight_dims = in_dims[:4]
    x = front(x, x_dim)
    stacked = any(dim is not None for dim in weight_dims)
    vector = x.dim() - (x_dim is not None) == 1
    if not stacked and packed.dim() == 2:  # x alone: its rows fold
        return qmm(x, packed, scales, biases, group_size, transpose), 0
    weights: list[Tensor | None] = [packed, scales, biases]
    if stacked:
        weights = stack_all(info.batch_size, weights, weight_dims)
    if vector:
        x = x.unsqueeze(-2)
    rank = max(x.dim() - (x_dim is not None), weights[0].dim() - stacked)
    x = pad(x, x_dim is not None, rank)
    weights = [t if t is None else pad(t, stacked, rank) for t in weights]
    y = qmm(x, *weights, group_size, transpose)
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
    return tuple(pad(t, True, len(shape)).expand(info.batch_size, *shape) for t in (left, right))


def _gather_qmm(
    info: Any,
    in_dims: Dims,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None,
    lhs_indices: Tensor | None,
    rhs_indices: Tensor | None,
    group_size: int = 128,
    transpose: bool = True,
    sorted_indices: bool = False,
) -> tuple[Tensor, int]:
    x_dim, *weight_dims = in_dims[:4]
    x = front(x, x_dim)
    weights: list[Tensor | None] = [packed, scales, biases]
    stacked = any(dim is not None for dim in weight_dims)
    if stacked:
        weights = stack_all(info.batch_size, weights, weight_dims)
    lhs, rhs = _gathered(
        info,
        x,
        x_dim is not None,
        weights[0],
        stacked,
        (lhs_indices, in_dims[4]),
        (rhs_indices, in_dims[5]),
    )
    return gather_qmm(x, *weights, lhs, rhs, group_size, transpose), 0


def _affine_grad(
    info: Any,
    in_dims: Dims,
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    lhs_indices: Tensor | None,
    rhs_indices: Tensor | None,
    group_size: int = 128,
    transpose: bool = True,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    grad, x, packed = stack_all(info.batch_size, [grad, x, packed], list(in_dims[:3]))
    if lhs_indices is not None or rhs_indices is not None:
        lhs, rhs = _gathered(
            info, x, True, packed, True, (lhs_indices, in_dims[3]), (rhs_indices, in_dims[4])
        )
        return affine_grad(grad, x, packed, lhs, rhs, group_size, transpose), (0, 0)
    if packed.dim() == 3:  # one matrix each: the rows of x fold
        x, grad = (t.reshape(len(t), t.shape[1:-1].numel(), t.shape[-1]) for t in (x, grad))
    elif x.dim() == 2:  # a vector each, for a stack of matrices
        x, grad = x.unsqueeze(-2), grad.unsqueeze(-2)
    lead = packed.dim()
    rank = max(x.dim(), lead) - 1
    x, padded = pad(x, True, rank), pad(packed, True, rank)
    sums = affine_grad(grad, x, padded, None, None, group_size, transpose)
    return tuple(t.reshape(*packed.shape[:-1], t.shape[-1]) for t in sums), (0, 0)


def _qmm_prepacked(
    info: Any, in_dims: Dims, x: Tensor, prepacked: Tensor, *form: Any
) -> tuple[Tensor, int]:
    if in_dims[1] is None:  # x alone: its rows fold
        return qmm_prepacked(front(x, in_dims[0]), prepacked, *form), 0
    pairs = zip(*stack_all(info.batch_size, [x, prepacked], list(in_dims[:2])), strict=True)
    return torch.stack([qmm_prepacked(a, b.contiguous(), *form) for a, b in pairs]), 0


def _unprepack(
    info: Any, in_dims: Dims, prepacked: Tensor, *form: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    each = [torch.ops.onebit.unprepack(t.contiguous(), *form) for t in front(prepacked, in_dims[0])]
    return tuple(map(torch.stack, zip(*each, strict=True))), (0, 0, 0)


# An operator stays one call, whatever of it is batched; but there is no stack of prepacked weights.
VMAP_RULES = {
    "qmm": _qmm,
    "qmm_prepacked": _qmm_prepacked,
    "unprepack": _unprepack,
    "gather_qmm": _gather_qmm,
    "affine_grad": _affine_grad,
}
