"""quantize, dequantize and embedding: the format bit for bit, against NumPy and against live
MLX."""

import itertools
import sys

import numpy as np
import pytest
import reference
import torch
from cases import FLOATS, GROUP_SIZES
from helpers import make_weights, to_numpy
from test_golden import assert_same_bits
from torch import Tensor

ops = torch.ops.onebit
inf, nan = float("inf"), float("nan")

try:
    import mlx.core as mx
except ImportError:
    mx = None


def near_ties(group_size: int) -> Tensor:
    """Groups whose values sit on, just above and just below the middle of their range."""
    low, high = torch.randn(200, 1) - 2, torch.randn(200, 1) + 2
    middle = (low + high) / 2
    step = torch.randint(-3, 4, (200, group_size))
    w = middle + step * torch.finfo(torch.float32).eps * middle.abs()
    w[:, :1], w[:, 1:2] = low, high
    return w


def special(*values: float) -> "callable":
    """One group that cycles through the values, in every rotation, among ordinary groups."""

    def make(group_size: int) -> Tensor:
        cycle = itertools.cycle(values)
        w = torch.tensor([next(cycle) for _ in range(len(values) * group_size)])
        return torch.stack([w.roll(i)[:group_size] for i in range(len(values))])

    return make


INPUTS = {
    "normal values": lambda g: torch.randn(64, g),
    "near ties": near_ties,
    "zeros": special(0.0),
    "both zeros": special(0.0, -0.0),
    "constant": special(0.7),
    "two levels": special(-0.25, 0.25),
    "all negative": lambda g: -torch.rand(16, g) - 1,
    "all positive": lambda g: torch.rand(16, g) + 1,
    "subnormal": lambda g: torch.randn(16, g) * 1e-40,
    "smallest scale": lambda g: torch.randn(16, g) * 1e-8,
    "overflowing range": lambda g: torch.randn(16, g) * 3e38,
    "float16 overflow": lambda g: torch.randn(16, g) * 60000,
    "positive infinity": special(1.0, inf, -2.0),
    "negative infinity": special(1.0, -inf, -2.0),
    "both infinities": special(inf, -inf, 0.5),
    "some nan": special(1.0, nan, -2.0, 0.5),
    "all nan": special(nan),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_follows_the_rule(name, group_size, dtype, device, isa):
    w = INPUTS[name](group_size).to(dtype)
    packed, scales, biases = (t.cpu() for t in ops.quantize(w.to(device), group_size))
    expected = reference.quantize(w.float().numpy(), group_size)
    assert np.array_equal(to_numpy(packed), expected[0])
    assert_same_bits(scales, torch.from_numpy(expected[1]).to(dtype))
    assert_same_bits(biases, torch.from_numpy(expected[2]).to(dtype))


def test_mlx_is_here_where_it_can_be():
    """So that the live comparison below cannot vanish unnoticed from CI."""
    if sys.platform == "linux" and torch.ops.onebit.cpu_isas() != ["neon", "scalar"]:
        assert mx is not None, "install the test extra: mlx[cpu]"


def to_mlx(t: Tensor) -> "mx.array":
    if t.dtype == torch.bfloat16:
        return mx.array(t.view(torch.int16).numpy().view(np.uint16)).view(mx.bfloat16)
    return mx.array(t.numpy())


def from_mlx(a: "mx.array") -> Tensor:
    if a.dtype == mx.bfloat16:
        bits = np.array(a.view(mx.uint16)).view(np.int16)
        return torch.from_numpy(bits.copy()).view(torch.bfloat16)
    array = np.array(a)
    return torch.from_numpy((array.view(np.int32) if array.dtype == np.uint32 else array).copy())


@pytest.mark.skipif(mx is None, reason="needs the mlx package")
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_and_dequantize_equal_live_mlx(name, group_size, dtype, isa):
    w = INPUTS[name](group_size).to(dtype)
    theirs = mx.quantize(to_mlx(w), group_size=group_size, bits=1)
    ours = ops.quantize(w, group_size)
    assert torch.equal(ours[0], from_mlx(theirs[0]))
    assert_same_bits(ours[1], from_mlx(theirs[1]))
    assert_same_bits(ours[2], from_mlx(theirs[2]))
    decoded = mx.dequantize(*theirs, group_size=group_size, bits=1)
    assert_same_bits(ops.dequantize(*ours, group_size), from_mlx(decoded))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_dequantize_rounds_twice(group_size, dtype, symmetric, device, isa):
    packed, scales, biases = make_weights(
        9, 3 * group_size, group_size=group_size, dtype=dtype, symmetric=symmetric, device=device
    )
    scales[0, 0], scales[1, 0] = inf, nan
    spread = lambda t: t.repeat_interleave(group_size, -1)
    levels = -scales * 0.5 if biases is None else biases
    bits = torch.from_numpy(reference.unpack(to_numpy(packed))).to(device, dtype)
    expected = (bits * spread(scales)) + spread(levels)  # torch rounds each step to the dtype
    actual = ops.dequantize(packed, scales, biases, group_size)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_dequantize_takes_any_rank_and_layout(device, isa):
    packed, scales, biases = make_weights(2, 3, 5, 128, group_size=64, device=device)
    whole = ops.dequantize(packed, scales, biases, 64)
    assert whole.shape == (2, 3, 5, 128)
    picked = ops.dequantize(packed[:, 1, ::2], scales[:, 1, ::2], biases[:, 1, ::2], 64)
    assert torch.equal(picked, whole[:, 1, ::2])
    one = ops.dequantize(packed[0, 0, 0], scales[0, 0, 0], biases[0, 0, 0], 64)
    assert torch.equal(one, whole[0, 0, 0])


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (2, 0, 256)])
def test_quantize_of_nothing_is_empty(shape, device, isa):
    packed, scales, biases = ops.quantize(torch.empty(shape, device=device), 128)
    assert packed.shape == (*shape[:-1], shape[-1] // 32)
    assert scales.shape == biases.shape == (*shape[:-1], shape[-1] // 128)
    assert ops.dequantize(packed, scales, biases, 128).shape == shape


def test_quantize_reads_any_layout(device, isa):
    w = torch.randn(6, 256, device=device)
    expected = ops.quantize(w, 64)
    for layout in (w.t().contiguous().t(), torch.cat([w, w], 1)[:, :256], w[:1].expand(6, 256)):
        rows = expected if layout.stride(0) else [t[:1].expand(6, -1) for t in expected]
        for actual, wanted in zip(ops.quantize(layout, 64), rows, strict=True):
            assert torch.equal(actual, wanted)


def test_quantize_of_float64_decides_in_float64(isa):
    w = torch.randn(4, 64, dtype=torch.float64)
    packed, scales, biases = ops.quantize(w, 64)
    assert scales.dtype == biases.dtype == torch.float64
    two_levels = ops.dequantize(packed, scales, biases, 64)
    assert torch.equal(two_levels.amax(-1), biases[:, 0] + scales[:, 0])
    middle = biases + scales / 2
    assert torch.equal(two_levels > middle, w > middle)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0)])
def test_embedding_decodes_the_rows_named(index_dtype, shape, device, isa):
    weights = make_weights(11, 192, group_size=64, dtype=torch.float16, device=device)
    indices = torch.randint(0, 11, shape, dtype=index_dtype, device=device)
    expected = ops.dequantize(*weights, 64)[indices.long()]
    assert torch.equal(ops.embedding(indices, *weights, 64), expected)
