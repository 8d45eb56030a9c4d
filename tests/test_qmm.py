"""qmm: accurate for every shape, dtype and layout, whatever table and however many threads."""

from timeit import Timer

import pytest
import torch
from cases import MIX_IDS, MIXES, SHAPE_IDS, SHAPES
from helpers import assert_qmm, make_weights, torch_qmm
from torch import Tensor

ops = torch.ops.onebit
qmm = ops.qmm


def make_qmm(m, n, k, x_dtype, dtype, group_size, affine, transpose=True, device="cpu"):
    rows, columns = (n, k) if transpose else (k, n)
    packed, scales, biases = make_weights(
        rows, columns, group_size=group_size, dtype=dtype, symmetric=not affine, device=device
    )
    return torch.randn(m, k).to(device, x_dtype), packed, scales, biases, group_size, transpose


@pytest.mark.parametrize("mix", MIXES, ids=MIX_IDS)
@pytest.mark.parametrize("m, n, groups", SHAPES, ids=SHAPE_IDS)
def test_qmm_is_as_accurate_as_torch(m, n, groups, mix, device, isa):
    assert_qmm(*make_qmm(m, n, groups * mix[2], *mix, device=device))


@pytest.mark.parametrize("mix", MIXES, ids=MIX_IDS)
@pytest.mark.parametrize("m, n, groups", SHAPES, ids=SHAPE_IDS)
def test_qmm_without_transpose_is_as_accurate_as_torch(m, n, groups, mix, device, isa):
    # n counts groups here and k is free: the roles of the table's columns swap.
    assert_qmm(*make_qmm(m, groups * mix[2], n, *mix, transpose=False, device=device))


RANKS = [
    # x, leading dimensions of packed, why
    ((64,), (), "a vector"),
    ((2, 3, 4, 64), (), "leading dimensions fold into rows"),
    ((1, 3, 4, 64), (2, 1), "both broadcast"),
    ((4, 64), (3,), "one x for a stack of matrices"),
    ((3, 1, 64), (3,), "one row per matrix"),
    ((64,), (2, 3), "a vector for a stack of matrices"),
    ((2, 1, 5, 64), (3,), "packed has fewer leading dimensions"),
]


@pytest.mark.parametrize("x_shape, lead, why", RANKS, ids=[row[2] for row in RANKS])
@pytest.mark.parametrize("transpose", [True, False])
def test_qmm_broadcasts_as_matmul(x_shape, lead, why, transpose, device, isa):
    rows, columns = (40, 64) if transpose else (64, 96)
    packed, scales, biases = make_weights(*lead, rows, columns, group_size=32, device=device)
    assert_qmm(torch.randn(x_shape, device=device), packed, scales, biases, 32, transpose)


def with_strides(t: Tensor, layout: str) -> Tensor:
    """The same values in another layout."""
    if layout == "transposed":
        return t.mT.contiguous().mT
    if layout == "offset":
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    if layout == "stepped":
        return torch.stack([t, t], dim=-1)[..., 0]
    if layout == "expanded":
        return t[..., :1, :].expand(t.shape)
    raise ValueError(layout)


@pytest.mark.parametrize("argument", ["x", "packed", "scales", "biases"])
@pytest.mark.parametrize("layout", ["transposed", "offset", "stepped", "expanded"])
@pytest.mark.parametrize("m", [1, 6])
def test_qmm_reads_any_layout(argument, layout, m, device, isa):
    x = torch.randn(m, 256, device=device)
    args = dict(
        zip(("packed", "scales", "biases"), make_weights(70, 256, device=device), strict=True)
    )
    args = {"x": x, **args}
    args[argument] = with_strides(args[argument], layout)
    assert_qmm(*args.values(), 128)


EMPTY = [
    ((0, 64), (5, 64), (0, 5), "no rows"),
    ((3, 64), (0, 64), (3, 0), "no outputs"),
    ((3, 0), (5, 0), (3, 5), "nothing to sum"),
    ((2, 0, 64), (5, 64), (2, 0, 5), "no rows in the middle"),
    ((0, 4, 64), (0, 5, 64), (0, 4, 5), "no matrices"),
]


@pytest.mark.parametrize("x_shape, w_shape, y_shape, why", EMPTY, ids=[row[3] for row in EMPTY])
def test_qmm_of_nothing_is_zeros_or_empty(x_shape, w_shape, y_shape, why, device, isa):
    packed, scales, biases = make_weights(*w_shape, group_size=32, device=device)
    y = qmm(torch.randn(x_shape, device=device), packed, scales, biases, 32)
    assert y.shape == y_shape
    assert not y.any()


def test_qmm_takes_mlx_words_as_they_are(device):
    packed, scales, biases = make_weights(16, 128, device=device)
    x = torch.randn(3, 128, device=device)
    assert torch.equal(
        qmm(x, packed.view(torch.uint32), scales, biases, 128), qmm(x, packed, scales, biases, 128)
    )


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("m", [1, 70])
def test_qmm_does_not_depend_on_the_number_of_threads(m, transpose, isa):
    args = make_qmm(m, 640, 512, torch.float32, torch.float16, 128, True, transpose)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(qmm(*args))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0], other)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("n", [2, 256])
def test_infinity_and_nan_in_x_are_as_in_torch(dtype, transpose, n, isa):
    # Per row of x: what is at columns 5 and 7. Levels of either sign and, in one group, of 0.
    rows = [(INF, 0), (-INF, 0), (INF, -INF), (NAN, 0), (1, 2), (INF, 3)]
    shape = (n, 128) if transpose else (128, n // 32 * 32 or 32)
    packed, scales, biases = make_weights(*shape, group_size=32)
    biases[: shape[0] // 2] = 0
    x = torch.zeros(len(rows), 128, dtype=dtype)
    x[:, 5], x[:, 7] = torch.tensor(rows).to(dtype).T
    y = qmm(x, packed, scales, biases, 32, transpose)
    torch.testing.assert_close(
        y, torch_qmm(x, packed, scales, biases, 32, transpose), equal_nan=True, rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("m", [1, 3])
def test_a_row_does_not_depend_on_what_the_others_hold(m, isa):
    packed, scales, biases = make_weights(256, 512)
    x = torch.randn(4, 512, dtype=torch.bfloat16)
    others = x.clone()
    others[m, 5], others[m, 200] = INF, 1e20
    keep = [i for i in range(4) if i != m]
    assert torch.equal(
        qmm(x, packed, scales, biases, 128)[keep], qmm(others, packed, scales, biases, 128)[keep]
    )


@pytest.mark.parametrize("value", [2e37, 1e-38, 1e-42])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("m", [1, 5])
def test_extreme_values_neither_overflow_nor_vanish(value, transpose, m, isa):
    # Sums of x overflow, products do not; and the step of tables would be below the smallest float.
    packed, scales, biases = make_weights(128, 128)
    x = value * (1 + torch.rand(m, 128))
    scale = 1e-3 if value > 1 else 1e3
    args = (x, packed, scale * scales, scale * biases, 128, transpose)
    expected = torch_qmm(args[0].double(), packed, args[2].double(), args[3].double(), *args[4:])
    assert expected.isfinite().all() and expected.abs().max() < 3e38
    assert (qmm(*args).double() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("levels", [(INF, 0.5), (0.5, INF), (INF, None), (NAN, 0.5), (1.0, NAN)])
@pytest.mark.parametrize("m", [1, 4, 9])
def test_levels_that_are_not_finite_spoil_what_they_meet(levels, m, isa):
    packed, scales, biases = make_weights(160, 256)
    scales[7, 1] = levels[0]
    if levels[1] is None:
        biases = None
    else:
        biases[7, 1] = levels[1]
    y = qmm(torch.randn(m, 256), packed, scales, biases, 128)
    assert not y[:, 7].isfinite().any()
    assert y[:, :7].isfinite().all() and y[:, 8:].isfinite().all()


SUBNORMAL, ONES = 1e-39 * torch.randn(64, 512), torch.randn(64, 512)
FLUSHED = {
    "qmm": lambda *w: qmm(SUBNORMAL, *w, 128),
    "qmm, transposed": lambda *w: qmm(SUBNORMAL, *w, 128, False),
    "qmm of subnormal levels": lambda *w: qmm(ONES, *w, 128),
    "affine_grad": lambda packed, *_: ops.affine_grad(ONES, SUBNORMAL, packed, None, None, 128),
    "quantize": lambda *_: ops.quantize(SUBNORMAL, 128),
    "dequantize": lambda *w: ops.dequantize(*w, 128),
    "quantize_levels": lambda *_: ops.quantize_levels(SUBNORMAL, "optimal", 128),
    "fake_quantize": lambda *_: ops.fake_quantize(SUBNORMAL, "mean", 128),
}


@pytest.mark.parametrize("name", FLUSHED)
def test_flush_to_zero_mode_changes_nothing(name, isa):
    """On any number of threads: PyTorch sets the mode on the calling one alone."""
    packed, scales, biases = make_weights(512, 512)
    levels = (1e-39 * scales, 1e-39 * biases)
    weights = (packed, *(levels if "levels" in name or name == "dequantize" else (scales, biases)))
    before, threads = results(FLUSHED[name](*weights)), torch.get_num_threads()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        after = results(FLUSHED[name](*weights))
        torch.set_num_threads(1)
        alone = results(FLUSHED[name](*weights))
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert any(t.any() for t in before)
    for a, b, c in zip(before, after, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def results(y: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [t.view(torch.int32) for t in (y if isinstance(y, tuple) else (y,))]


def test_qmm_sums_in_float32_whatever_x_is(isa):
    # 4096 equal float16 values of 1: a float16 sum would stop at 2048.
    packed = torch.full((3, 128), -1, dtype=torch.int32)
    scales, biases = torch.ones(3, 32), torch.zeros(3, 32)
    y = qmm(torch.ones(1, 4096, dtype=torch.float16), packed, scales, biases, 128)
    assert y.tolist() == [[4096.0] * 3]


@pytest.mark.parametrize("m", [1, 6])
def test_a_tile_with_few_outputs_takes_no_longer_than_a_full_one(m, isa):
    """Whatever memory holds of the product before in the place of the outputs that are not."""
    n, k = 128, 4096
    x = torch.randn(m, k) * 1e-12
    x[:, ::128], x[:, 1::128] = 1, -1  # the rest is lost in fixed point
    packed, scales, _ = make_weights(n, k)
    before = (x, packed, scales, torch.zeros_like(scales), 128)  # beside 0 it counts

    def seconds(rows: int) -> float:
        call = Timer(lambda: qmm(x, packed[:rows], scales[:rows], -scales[:rows] / 2, 128)).timeit
        qmm(*before)
        return min(call(1) for _ in range(30))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    few, full = seconds(17), seconds(n)
    torch.set_num_threads(threads)
    assert few < 1.5 * full
