"""Random tensors: any strides, offset and content that a legal call may have."""

import random

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GROUP_SIZES = (32, 64, 128)
SPECIAL = (float("nan"), float("inf"), float("-inf"))


def numbers(choose: random.Random, *shape: int) -> Tensor:
    """float32 of one of several kinds: as weights and activations are, and as they are not."""
    t = torch.randn(shape)
    kind = choose.random()
    if kind < 0.5 or not t.numel():
        return t
    if kind < 0.6:
        return t.relu()
    if kind < 0.65:
        return torch.full(shape, choose.choice([0.0, -0.0, 1.0, 0.3, -2.0]))
    if kind < 0.75:
        return torch.randint(-2, 3, shape).float()  # ties
    if kind < 0.8:
        return t * 10.0 ** choose.randint(-6, 3)
    if kind < 0.85:
        return 1 + 0.1 * t
    if kind < 0.9:
        return t.flatten().sort().values.view(shape)
    t.view(-1)[choose.randrange(t.numel())] = 2.0 ** choose.randint(1, 10)  # an outlier
    return t


def layout(choose: random.Random, t: Tensor) -> Tensor:
    """The values of t, strided, offset, transposed or expanded (then some of them repeat)."""
    kind = choose.random()
    if kind < 0.4 or not t.dim():
        return t
    if kind < 0.55:
        return t.mT.contiguous().mT if t.dim() > 1 else t
    if kind < 0.7:
        wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
        return wide[..., choose.randrange(2) :: 2].copy_(t)
    if kind < 0.85:
        start = choose.randrange(1, 4)
        return torch.empty(t.numel() + start, dtype=t.dtype)[start:].view(t.shape).copy_(t)
    d = choose.randrange(t.dim())
    if t.dtype in (torch.int32, torch.uint32) and d == t.dim() - 1:
        return t
    return t.narrow(d, 0, 1).expand(t.shape) if t.shape[d] > 1 else t


def unpacked(packed: Tensor) -> Tensor:
    """``[..., words * 32]`` booleans, by shifts alone."""
    shifts = torch.arange(32, dtype=torch.int32)
    return (packed.view(torch.int32).unsqueeze(-1) >> shifts & 1).flatten(-2).bool()


def words(choose: random.Random, *shape: int) -> Tensor:
    packed = torch.randint(-(2**31), 2**31, shape).to(torch.int32)
    kind = choose.random()
    if kind < 0.1:
        packed = torch.full_like(packed, choose.choice([0, -1, 1, -(2**31)]))
    packed = layout(choose, packed)
    return packed.view(torch.uint32) if choose.random() < 0.2 else packed


def weights(
    choose: random.Random, group_size: int, *lead: int, rows: int, groups: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """packed ``[*lead, rows, words]``, scales and biases (or None) of one floating dtype."""
    dtype = choose.choice(FLOATS)
    packed = words(choose, *lead, rows, groups * group_size // 32)
    scales = numbers(choose, *lead, rows, groups)
    if choose.random() < 0.7:
        scales = scales.abs()
    biases = -0.5 * scales + 0.1 * numbers(choose, *lead, rows, groups)
    scales, biases = (layout(choose, t.to(dtype)) for t in (scales, biases))
    return packed, scales, None if choose.random() < 0.3 else biases


def poisoned(choose: random.Random, t: Tensor) -> Tensor:
    """t, sometimes with a NaN or an infinity somewhere."""
    if choose.random() < 0.08 and t.numel():
        t = t.contiguous()
        t.view(-1)[choose.randrange(t.numel())] = choose.choice(SPECIAL)
    return t
