"""Random legal calls of the operators that choose levels, and what their results must be.

Bits are compared where rounding cannot decide them; levels given the bits.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzz.tensors import FLOATS, GROUP_SIZES, layout, numbers, poisoned, unpacked
from torch_onebit.ops import RULES

Check = Callable[[Any], None]


def grouped(t: Tensor, group_size: int) -> Tensor:
    return t.double().unflatten(-1, (t.shape[-1] // group_size, group_size))


def real_eps(w: Tensor) -> float:
    """The rounding of what decides: float32, float64 for float64 weights."""
    return torch.finfo(torch.float64 if w.dtype == torch.float64 else torch.float32).eps


def weight(choose: random.Random) -> tuple[Tensor, int]:
    group_size = choose.choice(GROUP_SIZES)
    shape = choose.choice([(), (0,), (1,), (3,), (2, 3), (19,)])
    w = numbers(choose, *shape, choose.choice([0, 1, 2, 3]) * group_size)
    return poisoned(choose, layout(choose, w.to(choose.choice(FLOATS)))), group_size


def weighted_mean(v: Tensor, h: Tensor) -> Tensor:
    return (v * h).sum(-1, keepdim=True) / h.sum(-1, keepdim=True)


def levels_of(v: Tensor, h: Tensor, bits: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """(low, high) of groups v with importance h, given the bits; differentiable in v."""
    if rule == "minmax":
        low = v.gather(-1, v.argmin(-1, keepdim=True))
        return low, v.gather(-1, v.argmax(-1, keepdim=True))
    if rule == "sign":
        high = weighted_mean(v.abs(), h)
        return -high, high
    if rule == "mean":
        mean = v.mean(-1, keepdim=True)
        deviation = (v - mean).abs().mean(-1, keepdim=True)
        return mean - deviation, mean + deviation
    return weighted_mean(v, h * ~bits), weighted_mean(v, h * bits)


def distance(v: Tensor, rule: str) -> Tensor:
    """How far values lie above the threshold of a rule that has one by formula."""
    if rule == "minmax":
        low, high = v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
        return v - low - (high - low) / 2
    return v - v.mean(-1, keepdim=True) if rule == "mean" else v


def least_errors(v: Tensor, h: Tensor) -> Tensor:
    """The best two-level squared error of each group, over every cut of the sorted values."""
    v, order = v.sort(-1)
    h = h.gather(-1, order)
    mass, first, second = h.cumsum(-1), (h * v).cumsum(-1), (h * v * v).cumsum(-1)

    def errors(m: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(m > 0, b - a * a / m.clamp_min(1e-300), 0.0)

    total = [t[..., -1:] for t in (mass, first, second)]
    rest = [t - part for t, part in zip(total, (mass, first, second), strict=True)]
    return (errors(mass, first, second) + errors(*rest)).amin(-1)


def regular(v: Tensor) -> Tensor:
    """Groups of numbers only."""
    return v.isfinite().all(-1)


def close(got: Tensor, want: Tensor, bound: Tensor, what: str) -> None:
    """got is want, but for a bound and one rounding; where that is beyond the dtype, infinite."""
    info = torch.finfo(got.dtype)
    inside = want.isfinite() & (want.abs() + bound < info.max)
    bound = bound + want.abs() * info.eps + info.smallest_normal * info.eps
    excess = ((got.double() - want).abs() - bound)[inside]
    assert not excess.isnan().any(), f"{what}: NaN where float64 is finite"
    worst = float(excess.max()) if excess.numel() else 0.0
    assert worst <= 0, f"{what}: {worst} beyond the bound"


def quantize_levels(choose: random.Random) -> tuple[dict, Check]:
    w, group_size = weight(choose)
    rule = choose.choice(RULES)
    importance = None
    if rule in ("sign", "optimal") and choose.random() < 0.5:
        shape = w.shape if choose.random() < 0.5 else w.shape[-1:]
        importance = torch.randint(0, 5, shape).to(choose.choice(FLOATS)) / 4

    def check(result: tuple[Tensor, Tensor, Tensor]) -> None:
        packed, scales, biases = result
        assert packed.dtype == torch.int32 and scales.dtype == biases.dtype == w.dtype
        assert packed.shape == (*w.shape[:-1], w.shape[-1] // 32)
        assert scales.shape == biases.shape == (*w.shape[:-1], w.shape[-1] // group_size)
        if not w.numel():
            return
        v, bits = grouped(w, group_size), unpacked(packed).unflatten(-1, (-1, group_size))
        h = torch.ones_like(v)
        if importance is not None:
            h = grouped(importance, group_size).expand_as(v)
            h = torch.where(h.sum(-1, keepdim=True) > 0, h, 1.0)
        eps, ok, largest = real_eps(w) * 64, regular(v), v.abs().amax(-1, keepdim=True)
        low, high = levels_of(v, h, bits, rule)
        if rule == "optimal":
            error = (h * (v - torch.where(bits, high, low)).nan_to_num() ** 2).sum(-1)
            slack = least_errors(v, h) * 1e-3 + (h * v * v).sum(-1) * eps
            assert (error - least_errors(v, h) <= slack)[ok].all(), "optimal: a better cut exists"
            ok = ok & ((h * bits).sum(-1) > 0) & ((h * ~bits).sum(-1) > 0)
        else:
            d = distance(v, rule)
            sure = (d.abs() > largest * eps) & ok.unsqueeze(-1)
            assert torch.equal(bits[sure], (d > 0)[sure]), "bits"
        bound = largest.squeeze(-1)[ok] * eps
        close(biases[ok], low.squeeze(-1)[ok], bound, "biases")
        close(scales[ok], (high - low).squeeze(-1)[ok], bound, "scales")

    arguments = {"w": w, "rule": rule, "group_size": group_size, "importance": importance}
    return arguments, check


def sure_groups(v: Tensor, rule: str, eps: float) -> Tensor:
    """Groups whose bits and signs rounding cannot decide."""
    largest = v.abs().amax(-1, keepdim=True)
    near = distance(v, rule).abs() <= largest * eps
    if rule == "minmax":  # the first of several extremes is anybody's
        near = near | ((v == v.amin(-1, keepdim=True)).sum(-1, keepdim=True) > 1)
        near = near | ((v == v.amax(-1, keepdim=True)).sum(-1, keepdim=True) > 1)
    return regular(v) & ~near.any(-1)


def bits_by(w: Tensor, rule: str, group_size: int) -> Tensor:
    packed = torch.ops.onebit.quantize_levels(w, rule, group_size)[0]
    return unpacked(packed).unflatten(-1, (-1, group_size))


def fake_quantize(choose: random.Random) -> tuple[dict, Check]:
    w, group_size = weight(choose)
    rule, dtype = choose.choice(RULES), choose.choice([None, *FLOATS])

    def check(result: Tensor) -> None:
        assert result.shape == w.shape and result.dtype == (dtype or w.dtype)
        if not w.numel():
            return
        v, bits = grouped(w, group_size), bits_by(w, rule, group_size)
        low, high = levels_of(v, torch.ones_like(v), bits, rule)
        ok = regular(v)
        bound = v.abs().amax(-1, keepdim=True).expand_as(v)[ok] * real_eps(w) * 64
        got = result.unflatten(-1, (-1, group_size))
        close(got[ok], torch.where(bits, high, low)[ok], bound, "fake_quantize")

    return {"w": w, "rule": rule, "group_size": group_size, "dtype": dtype}, check


def fake_quantize_backward(choose: random.Random) -> tuple[dict, Check]:
    w, group_size = weight(choose)
    rule = choose.choice(RULES)
    grad = layout(choose, numbers(choose, *w.shape).to(choose.choice(FLOATS)))

    def check(result: Tensor) -> None:
        assert result.shape == w.shape and result.dtype == w.dtype
        if not w.numel():
            return
        v, g = grouped(w, group_size).clone().requires_grad_(), grouped(grad, group_size)
        bits = bits_by(w, rule, group_size)
        low, high = levels_of(v, torch.ones_like(v), bits, rule)
        levels = torch.where(bits, high, low)
        want = g + torch.autograd.grad(levels, v, g)[0]
        ok = sure_groups(v.detach(), rule, real_eps(w) * 64)
        mass = g.abs().sum(-1, keepdim=True).expand_as(g)
        got = result.unflatten(-1, (-1, group_size))
        close(got[ok], want[ok], mass[ok] * real_eps(w) * 64, "fake_quantize_backward")

    return {"grad": grad, "w": w, "rule": rule, "group_size": group_size}, check


def affine(choose: random.Random) -> dict:
    w, group_size = weight(choose)
    dtype = choose.choice(FLOATS)
    levels = [numbers(choose, *w.shape[:-1], w.shape[-1] // group_size) for _ in range(2)]
    scales, biases = (layout(choose, t.to(dtype)) for t in levels)
    return {"w": w, "scales": scales, "biases": biases, "group_size": group_size}


def affine_bits(arguments: dict) -> tuple[Tensor, Tensor]:
    """The bits, and where rounding cannot decide them."""
    w = arguments["w"]
    v = grouped(w, arguments["group_size"])
    scale, bias = (arguments[n].double().unsqueeze(-1) for n in ("scales", "biases"))
    above = (v - bias - scale / 2) * torch.where(scale < 0, -1.0, 1.0)
    size = v.abs() + bias.abs() + scale.abs()
    return above > 0, v.isfinite() & (above.abs() > size * real_eps(w) * 4)


def fake_quantize_affine(choose: random.Random) -> tuple[dict, Check]:
    arguments = {**affine(choose), "dtype": choose.choice([None, *FLOATS])}
    w, scales, biases = (arguments[n] for n in ("w", "scales", "biases"))

    def check(result: Tensor) -> None:
        assert result.shape == w.shape and result.dtype == (arguments["dtype"] or w.dtype)
        if not w.numel():
            return
        bits, sure = affine_bits(arguments)
        low, scale = biases.double().unsqueeze(-1), scales.double().unsqueeze(-1)
        want = torch.where(bits, low + scale, low)
        bound = (low.abs() + scale.abs()).expand_as(want) * real_eps(w) * 4
        got = result.unflatten(-1, (-1, arguments["group_size"]))
        close(got[sure], want[sure], bound[sure], "fake_quantize_affine")

    return arguments, check


def fake_quantize_affine_backward(choose: random.Random) -> tuple[dict, Check]:
    arguments = affine(choose)
    w = arguments["w"]
    grad = layout(choose, numbers(choose, *w.shape).to(choose.choice(FLOATS)))

    def check(result: tuple[Tensor, Tensor]) -> None:
        assert all(t.shape == arguments["scales"].shape for t in result)
        assert all(t.dtype == arguments["scales"].dtype for t in result)
        if not w.numel():
            return
        bits, sure = affine_bits(arguments)
        g, ok = grouped(grad, arguments["group_size"]), sure.all(-1)
        bound = g.abs().sum(-1)[ok] * real_eps(w) * 64
        close(result[0][ok], (g * bits).sum(-1)[ok], bound, "grad_scales")
        close(result[1][ok], g.sum(-1)[ok], bound, "grad_biases")

    return {"grad": grad, **arguments}, check


def flip_bits_(choose: random.Random, sweeps: int = 0) -> tuple[dict, Check]:
    """Changes are what flipped, and the loss does not rise; of ``descend_`` if sweeps are given."""
    group_size = choose.choice([32, 32, 64])
    rows, k = choose.choice([0, 1, 3, 17]), group_size * choose.choice([1, 2])
    real = choose.choice([torch.float32, torch.float64])
    w, x = numbers(choose, rows, k).to(real), torch.randn(2 * k, k, dtype=real)
    moments = x.T @ x
    scales, biases = (torch.randn(rows, k // group_size, dtype=real) for _ in range(2))
    bits = torch.rand(rows, k) < 0.5
    spread = lambda t: t.repeat_interleave(group_size, -1)
    moments = moments.mT if choose.random() < 0.3 else moments
    begin = 0 if sweeps else choose.randrange(k)
    end = k if sweeps else choose.randrange(begin, k) + 1
    before = bits.clone()

    def difference(b: Tensor) -> Tensor:
        return (w - (b * spread(scales) + spread(biases))).double()

    def loss(b: Tensor) -> Tensor:
        d = difference(b)
        return ((d @ moments.double()) * d).sum(-1)

    error = (difference(before) @ moments.double()).to(real)
    error = error.mT.contiguous().mT if choose.random() < 0.3 else error

    def check(changes: Tensor) -> None:
        flipped = before != bits
        outside = torch.ones(k, dtype=torch.bool)
        outside[begin:end] = False
        assert not flipped[:, outside].any(), "a bit outside flipped"
        if sweeps:
            extra = changes - flipped.sum(1)
            assert ((extra >= 0) & (extra % 2 == 0)).all(), "flips"
            assert (changes <= sweeps * k).all(), "more flips than sweeps allow"
        else:
            step = torch.where(before, -1.0, 1.0).to(real) * spread(scales)
            want = torch.where(flipped, step, 0.0)[:, begin:end]
            assert torch.equal(changes, want), "changes"
        start, now = loss(before), loss(bits)
        slack = (start.abs() + now.abs()) * torch.finfo(real).eps * 8 * k
        assert (now <= start + slack).all(), f"the loss rose by {(now - start).max()}"
        bits.copy_(before)  # for the next instruction set

    arguments = {
        "bits": bits,
        "error": error,
        "scales": scales,
        "moments": moments,
        "group_size": group_size,
    }
    return arguments | ({"sweeps": sweeps} if sweeps else {"begin": begin, "end": end}), check


def descend_(choose: random.Random) -> tuple[dict, Check]:
    return flip_bits_(choose, choose.choice([1, 2, 5]))


CALLS: dict[str, Callable[[random.Random], tuple[dict, Check]]] = {
    "quantize_levels": quantize_levels,
    "fake_quantize": fake_quantize,
    "fake_quantize_backward": fake_quantize_backward,
    "fake_quantize_affine": fake_quantize_affine,
    "fake_quantize_affine_backward": fake_quantize_affine_backward,
    "flip_bits_": flip_bits_,
    "descend_": descend_,
}
