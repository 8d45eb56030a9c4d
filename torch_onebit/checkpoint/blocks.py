"""Blocks of GGUF to tensors and back: Q1_0 exactly, Q8_0, and plain floats.

A block of Q1_0 is a float16 ``d`` and 128 bits, least significant first, for weights of ``±d``:
groups of 128 with ``scales = 2 d`` and ``biases = -d``.
"""

import torch
from torch import Tensor

from torch_onebit.checkpoint.gguf import BF16, F16, F32, Q1_0, Q8_0
from torch_onebit.checkpoint.source import CheckpointError, Packed

GROUP = 128
FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
LARGEST = 32752.0  # twice that is the largest float16


def unpack_q1_0(name: str, data: Tensor, rows: int, columns: int) -> Packed:
    """The matrix ``[rows, columns]`` of ``data``, uint8 blocks.

    Raises:
        CheckpointError: a scale that is not finite, or whose double float16 does not hold.
    """
    blocks = data.view(rows, columns // GROUP, 18)
    d = _copied(blocks[..., :2], torch.float16).squeeze(-1)
    if not (d.abs() <= LARGEST).all():  # NaN compares false
        raise CheckpointError(f"{name} must have scales of at most {LARGEST:g}, got more or NaN")
    words = _copied(blocks[..., 2:], torch.int32).flatten(1)
    return Packed(words, 2 * d, -d, GROUP)


def pack_q1_0(name: str, layer: Packed) -> Tensor:
    """The blocks of a matrix, uint8.

    Raises:
        CheckpointError: groups of another size, or levels that are not plus and minus one float16
            number: they would lose bits.
    """
    if layer.group_size != GROUP:
        raise CheckpointError(
            f"{name} must have groups of {GROUP} for GGUF Q1_0, got {layer.group_size}"
        )
    scales = layer.scales.detach().cpu()
    d = (scales.double() / 2).to(torch.float16)
    biases = -scales.double() / 2 if layer.biases is None else layer.biases.detach().cpu().double()
    exact = (2 * d.double() == scales.double()) & (-d.double() == biases)
    if not exact.all():
        raise CheckpointError(
            f"{name} must have weights of plus and minus one float16 number in each group for GGUF "
            "Q1_0 (quantize with symmetric=True and levels in float16), "
            f"got {int((~exact).sum())} groups of {exact.numel()} that are not"
        )
    words = layer.weight.detach().cpu().contiguous().view(torch.int32)
    bits = words.view(torch.uint8).view(len(d), -1, GROUP // 8)
    return torch.cat([d.contiguous().unsqueeze(-1).view(torch.uint8), bits], -1).flatten()


def _copied(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A part of each block as another dtype. Not contiguous(): a part of one block is so already,
    at an address that the dtype may not have."""
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def decode(kind: int, data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A dense tensor: floats as they are, Q8_0 as float32."""
    if kind == Q8_0:
        blocks = data.view(-1, 34)
        d = _copied(blocks[:, :2], torch.float16).float()
        return (blocks[:, 2:].view(torch.int8) * d).view(shape)
    dtype = FLOATS[kind]
    if data.numel() and data.data_ptr() % dtype.itemsize:
        data = data.clone()  # an alignment of 1 is legal
    return data.view(dtype).view(shape)


def encode(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


KINDS = {dtype: kind for kind, dtype in FLOATS.items()}
SUPPORTED = (*FLOATS, Q8_0, Q1_0)
