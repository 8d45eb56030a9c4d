"""The operators with types and documentation; each is ``torch.ops.onebit.<name>``.

The format: bit ``b`` of a weight in group ``g`` stands for ``scales[g] * b + biases[g]``. Groups of
32, 64 or 128 weights run along the last dimension; weight ``j`` of a row is bit ``j % 32`` of word
``j // 32``.
"""

import torch
from torch import Tensor

__all__ = [
    "affine_grad",
    "dequantize",
    "embedding",
    "gather_qmm",
    "linear",
    "prepack",
    "qmm",
    "quantize",
]

# linear without the call of a Python function, for modules.
linear_op = torch.ops.onebit.linear


def quantize(w: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to 1 bit by MLX's min/max rule: exact for weights that already take two values.

    Per group ``scale = max - min``, ``bias = min`` and ``bit = w - min > scale / 2``. For
    real-valued weights this rule is poor; see ``torch_onebit.quantize_``.

    Args:
        w: ``[..., k]``, float32, float16, bfloat16 or float64; k a multiple of ``group_size``.
        group_size: 32, 64 or 128.
    Returns:
        packed ``[..., k // 32]`` int32, scales and biases ``[..., k // group_size]`` in the dtype
        of w.
    Raises:
        ValueError: an argument that the format does not allow; the message names it and its value.
    """
    return torch.ops.onebit.quantize(w, group_size)


def dequantize(
    packed: Tensor, scales: Tensor, biases: Tensor | None = None, group_size: int = 128
) -> Tensor:
    """Decode packed weights: ``w = round(round(bit * scale) + bias)`` in the dtype of the scales.

    Args:
        packed: ``[..., k // 32]``, int32 (or uint32, the same bits).
        scales, biases: ``[..., k // group_size]``, one floating dtype. Without biases they are
            ``-scales / 2``: weights of ``±scale / 2``.
        group_size: 32, 64 or 128.
    Returns:
        ``[..., k]`` in the dtype of scales.
    Raises:
        ValueError: an argument that the format does not allow; the message names it and its value.
    """
    return torch.ops.onebit.dequantize(packed, scales, biases, group_size)


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


def linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 128,
    *,
    prepacked: Tensor | None = None,
) -> Tensor:
    """``y = x @ w.T + bias``: what ``OneBitLinear`` computes.

    Args:
        x, packed, scales, biases, group_size: as in ``qmm``.
        bias: ``[n]``, any floating dtype; it is added in the dtype of x.
        prepacked: what ``prepack`` made of these weights. On the CPU, up to four rows of x are
            multiplied with it; with more rows, on other devices, and where something requires grad,
            the weights themselves are used.
    Returns:
        ``[..., n]`` in the dtype of x.
    Raises:
        ValueError: an argument that the format does not allow, or prepacked from other weights (a
            sample is compared); the message names it and its value.
    """
    return linear_op(x, packed, scales, biases, bias, prepacked, group_size)


def prepack(
    packed: Tensor, scales: Tensor, biases: Tensor | None = None, group_size: int = 128
) -> Tensor:
    """The interleaved copy of a matrix of weights that ``linear`` can use on the CPU.

    Args:
        packed: ``[n, k // 32]``, int32 or uint32.
        scales, biases: ``[n, k // group_size]``, float32, float16 or bfloat16.
    Returns:
        uint8 vector; its layout may change from version to version: never store it.
    Raises:
        ValueError: an argument that the format does not allow; the message names it and its value.
        NotImplementedError: not on the CPU, or kernels without such a form (all but avx512).
    """
    return torch.ops.onebit.prepack(packed, scales, biases, group_size)


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


def embedding(
    indices: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    group_size: int = 128,
) -> Tensor:
    """Decode the rows that indices name.

    Args:
        indices: any shape, int32 or int64.
        packed: ``[rows, k // 32]``; scales, biases: ``[rows, k // group_size]``; see
            ``dequantize``.
        group_size: 32, 64 or 128.
    Returns:
        ``[*indices.shape, k]`` in the dtype of scales.
    Raises:
        ValueError: an argument that the format does not allow; the message names it and its value.
        IndexError: an index outside the rows.
    """
    return torch.ops.onebit.embedding(indices, packed, scales, biases, group_size)


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
