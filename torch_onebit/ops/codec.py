"""Weights to bits and back."""

from typing import Any

import torch
from torch import Tensor

from torch_onebit.ops.batching import Dims, front, stack_all
from torch_onebit.ops.typed import typed


@typed
def quantize(w: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to 1 bit by MLX's min/max rule, which is poor for real-valued weights.

    Per group ``scale = max - min``, ``bias = min`` and ``bit = w - min > scale / 2``: exact for
    weights that already take two values. For others see ``torch_onebit.quantize_``.

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


@typed
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


@typed
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


def _quantize(info: Any, in_dims: Dims, w: Tensor, group_size: int = 128) -> tuple[Any, Any]:
    return quantize(front(w, in_dims[0]), group_size), (0, 0, 0)


def _dequantize(
    info: Any,
    in_dims: Dims,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None,
    group_size: int = 128,
) -> tuple[Tensor, int]:
    weights = stack_all(info.batch_size, [packed, scales, biases], list(in_dims[:3]))
    return dequantize(*weights, group_size), 0


def _embedding(
    info: Any,
    in_dims: Dims,
    indices: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None,
    group_size: int = 128,
) -> tuple[Tensor, int]:
    indices = front(indices, in_dims[0])
    if all(dim is None for dim in in_dims[1:4]):
        return embedding(indices, packed, scales, biases, group_size), 0
    weights = stack_all(info.batch_size, [packed, scales, biases], list(in_dims[1:4]))
    rows = weights[0].shape[1]
    if in_dims[0] is None:
        indices = indices.expand(info.batch_size, *indices.shape)
    offset = torch.arange(info.batch_size, device=indices.device) * rows
    indices = indices + offset.view(-1, *[1] * (indices.dim() - 1))
    flat = [t if t is None else t.flatten(0, 1) for t in weights]
    return embedding(indices, *flat, group_size), 0


VMAP_RULES = {"quantize": _quantize, "dequantize": _dequantize, "embedding": _embedding}
