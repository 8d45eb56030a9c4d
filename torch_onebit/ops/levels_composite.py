"""The operators of levels.py out of plain PyTorch, for devices that have no kernels here: right,
slow, and announced. A device with kernels never comes here.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_onebit.packing import pack_bits

BLOCK = 256  # columns whose flips see each other before the other columns do

_announced: set[tuple[str, str]] = set()


def _announce(op: str, t: Tensor) -> None:
    if (op, t.device.type) not in _announced:
        _announced.add((op, t.device.type))
        warnings.warn(
            f"torch_onebit has no kernel of {op} for {t.device.type} devices: it runs as plain "
            "PyTorch operators, correctly and slowly",
            stacklevel=3,
        )


def _groups(t: Tensor, group_size: int) -> Tensor:
    t = t if t.dtype == torch.float64 else t.float()
    return t.unflatten(-1, (t.shape[-1] // group_size, group_size))


def _threshold(v: Tensor, h: Tensor) -> Tensor:
    """The best cut of groups v ``[..., g]`` of importance h: the largest value below it, kept dim.

    With the mean taken away the sides sum to s and -s: the error falls by s^2 (1/h_low + 1/h_high).
    """
    values, order = v.sort(-1)
    weights = h.gather(-1, order)
    total = weights.sum(-1, keepdim=True)
    mean = (values * weights).sum(-1, keepdim=True) / total
    below = ((values - mean) * weights).cumsum(-1)[..., :-1]
    mass = weights.cumsum(-1)[..., :-1]
    score = below.square() / (mass * (total - mass))
    best = score.nan_to_num(-1.0, -1.0, -1.0).argmax(-1, keepdim=True)
    return values.gather(-1, best)


def _choose(
    w: Tensor, rule: str, group_size: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(groups, bits, low, high): ``[..., groups, g]`` twice, ``[..., groups, 1]`` twice."""
    v = _groups(w, group_size)
    h = torch.ones_like(v)
    if importance is not None:
        h = _groups(importance.expand(w.shape), group_size).to(v.dtype)
        h = torch.where(h.sum(-1, keepdim=True) > 0, h, 1.0)
    if rule == "minmax":
        low, high = v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
        return v, (v - low) > (high - low) * 0.5, low, high
    if rule == "sign":
        high = (h * v.abs()).sum(-1, keepdim=True) / h.sum(-1, keepdim=True)
        return v, v > 0, -high, high
    if rule == "mean":
        mean = v.mean(-1, keepdim=True)
        deviation = (v - mean).abs().mean(-1, keepdim=True)
        return v, v > mean, mean - deviation, mean + deviation
    bits = v > _threshold(v, h)
    sides = []
    for side, anchor in ((~bits, v.amin(-1, keepdim=True)), (bits, v.amax(-1, keepdim=True))):
        weights = h * side
        shift = (weights * (v - anchor)).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
        sides.append(anchor + shift)  # from the outermost value on: equal values stay exact
    low, high = sides
    low_empty, high_empty = (h * ~bits).sum(-1, True) <= 0, (h * bits).sum(-1, True) <= 0
    return v, bits, torch.where(low_empty, high, low), torch.where(high_empty, low, high)


def quantize_levels(
    w: Tensor, rule: str, group_size: int = 128, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _announce("quantize_levels", w)
    if w.numel() == 0:
        levels = w.new_zeros(*w.shape[:-1], w.shape[-1] // group_size)
        words = (*w.shape[:-1], w.shape[-1] // 32)
        return w.new_zeros(words, dtype=torch.int32), levels, levels.clone()
    _, bits, low, high = _choose(w, rule, group_size, importance)
    scales, biases = (t.squeeze(-1).to(w.dtype) for t in (high - low, low))
    return pack_bits(bits.flatten(-2)), scales, biases.contiguous()


def fake_quantize(
    w: Tensor, rule: str, group_size: int = 128, *, dtype: torch.dtype | None = None
) -> Tensor:
    _announce("fake_quantize", w)
    if w.numel() == 0:
        return w.new_zeros(w.shape, dtype=dtype or w.dtype)
    _, bits, low, high = _choose(w, rule, group_size)
    return torch.where(bits, high, low).flatten(-2).to(dtype or w.dtype)


def fake_quantize_backward(grad: Tensor, w: Tensor, rule: str, group_size: int = 128) -> Tensor:
    _announce("fake_quantize_backward", w)
    if w.numel() == 0:
        return torch.zeros_like(w)
    v, bits, _, _ = _choose(w, rule, group_size)
    g = _groups(grad, group_size).to(v.dtype)
    to_high = (g * bits).sum(-1, keepdim=True)
    to_low = (g * ~bits).sum(-1, keepdim=True)
    if rule == "minmax":
        through = torch.zeros_like(v)
        through.scatter_add_(-1, v.argmax(-1, keepdim=True), to_high)
        through.scatter_add_(-1, v.argmin(-1, keepdim=True), to_low)
    elif rule == "sign":
        through = v.sign() * (to_high - to_low) / group_size
    elif rule == "mean":
        sign = (v - v.mean(-1, keepdim=True)).sign()
        slope = (to_high - to_low) / group_size
        balanced = sign - sign.mean(-1, keepdim=True)
        through = (to_high + to_low) / group_size + slope * balanced
    else:
        count = bits.sum(-1, keepdim=True)
        high, low = to_high / count.clamp_min(1), to_low / (group_size - count).clamp_min(1)
        through = torch.where(bits, high, low)
    return (g + through).flatten(-2).to(w.dtype)


def _affine(w: Tensor, scales: Tensor, biases: Tensor, group_size: int):
    v = _groups(w, group_size)
    s, b = (t.unsqueeze(-1).to(v.dtype) for t in (scales, biases))
    bits = torch.where(s >= 0, v - b > s * 0.5, v - b < s * 0.5)
    return bits, s, b


def fake_quantize_affine(
    w: Tensor,
    scales: Tensor,
    biases: Tensor,
    group_size: int = 128,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _announce("fake_quantize_affine", w)
    bits, s, b = _affine(w, scales, biases, group_size)
    return torch.where(bits, b + s, b).flatten(-2).to(dtype or w.dtype)


def fake_quantize_affine_backward(
    grad: Tensor, w: Tensor, scales: Tensor, biases: Tensor, group_size: int = 128
) -> tuple[Tensor, Tensor]:
    _announce("fake_quantize_affine_backward", w)
    bits, s, _ = _affine(w, scales, biases, group_size)
    g = _groups(grad, group_size).to(s.dtype)
    return (g * bits).sum(-1).to(scales.dtype), g.sum(-1).to(scales.dtype)


def flip_bits_(
    bits: Tensor,
    error: Tensor,
    scales: Tensor,
    moments: Tensor,
    begin: int,
    end: int,
    group_size: int = 128,
) -> Tensor:
    _announce("flip_bits_", bits)
    local = error[:, begin:end].clone()
    changes = torch.empty_like(local)
    for j in range(begin, end):
        step = scales[:, j // group_size]
        d = torch.where(bits[:, j], -step, step)
        flips = 2 * d * local[:, j - begin] > d * d * moments[j, j]
        bits[:, j] ^= flips
        changes[:, j - begin] = d = d * flips
        local -= d.unsqueeze(1) * moments[j, begin:end]
    return changes


def descend_(
    bits: Tensor,
    error: Tensor,
    scales: Tensor,
    moments: Tensor,
    sweeps: int,
    group_size: int = 128,
) -> Tensor:
    """By matrix products, which suit a GPU, and flip_bits_, which may have a kernel there."""
    error, flips = error.clone(), torch.zeros(len(bits), dtype=torch.int64, device=bits.device)
    for _ in range(sweeps):
        before = flips
        for begin in range(0, bits.shape[1], BLOCK):
            end = min(begin + BLOCK, bits.shape[1])
            changes = torch.ops.onebit.flip_bits_(
                bits, error, scales, moments, begin, end, group_size
            )
            error.addmm_(changes, moments[begin:end], alpha=-1)
            flips = flips + changes.ne(0).sum(1)
        if torch.equal(before, flips):
            break
    return flips


_OPS = (
    quantize_levels,
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_affine,
    fake_quantize_affine_backward,
    flip_bits_,
    descend_,
)


def _checked(op: Callable[..., Any]) -> Callable[..., Any]:
    """op, refusing what the kernels refuse: the rules are those of its Meta kernel."""
    rules = getattr(torch.ops.onebit, op.__name__).default

    @functools.wraps(op)
    def run(*args: Any, **kwargs: Any) -> Any:
        rules.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.Meta), *args, **kwargs)
        return op(*args, **kwargs)

    return run


def register() -> None:
    """Make them what devices without kernels run."""
    for op in _OPS:
        torch.library.impl(f"onebit::{op.__name__}", "CompositeExplicitAutograd", _checked(op))
