"""Bits to words and back, in plain torch: for code that decides bits itself."""

import torch
from torch import Tensor

from torch_onebit.checks import check_kind

WORD_BITS = 32


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans into words: value j of a row becomes bit ``j % 32`` of word ``j // 32``.

    Args:
        bits: ``[..., k]``, bool, k a multiple of 32.
    Returns:
        ``[..., k // 32]``, int32.
    Raises:
        ValueError: bits of another dtype, or a last dimension that is not a multiple of 32.
    """
    check_kind("bits", bits, Tensor, "a tensor")
    if bits.dtype != torch.bool:
        raise ValueError(f"bits must be bool, got {bits.dtype}")
    if bits.dim() == 0 or bits.shape[-1] % WORD_BITS:
        raise ValueError(
            f"bits must have a last dimension that is a multiple of 32, got {list(bits.shape)}"
        )
    if bits.numel() == 0:  # strides of an empty tensor may not allow the view below
        return bits.new_empty(*bits.shape[:-1], bits.shape[-1] // WORD_BITS, dtype=torch.int32)
    # uint8 first: eight times less memory than shifting int64 bits one by one.
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    octets = bits.unflatten(-1, (-1, 8)).to(torch.uint8) << shifts
    octets = octets.sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32)


def unpack_bits(packed: Tensor) -> Tensor:
    """The inverse of ``pack_bits``.

    Args:
        packed: ``[..., words]``, int32 or uint32.
    Returns:
        ``[..., words * 32]``, bool.
    Raises:
        ValueError: packed of another dtype.
    """
    check_kind("packed", packed, Tensor, "a tensor")
    if packed.dtype not in (torch.int32, torch.uint32):
        raise ValueError(f"packed must be int32 or uint32, got {packed.dtype}")
    # A copy: a last dimension of one word may have any stride and count as contiguous.
    octets = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((octets.unsqueeze(-1) >> shifts) & 1).flatten(-2).to(torch.bool)
