"""The MPS operators from the call to the shader, through the real encoder on a fake Metal."""

import math

import emulator
import pytest
import reference
import torch
from helpers import (
    assert_as_accurate_as_torch,
    assert_qmm,
    make_weights,
    relative_error,
    to_numpy,
    torch_qmm,
)
from host_build import M1, M1_MAX, M3_MAX, M5
from structured import Case, errors
from torch.utils._python_dispatch import TorchDispatchMode

from torch_onebit import OneBitLinear

ops = torch.ops.onebit
# run by test_mps_levels.py
LEVEL_KERNELS = (
    *("quantize_levels", "fake_quantize", "fake_quantize_backward"),
    *("fake_quantize_affine", "fake_quantize_affine_backward"),
)
FLOATS = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}


def log():
    return torch.ops.onebit_fake.take_log().split("\n")[:-1]


def kernels_of(log_lines):
    return [line.split()[0] for line in log_lines if line != "commit"]


def weights(*shape, **options):
    return make_weights(*shape, device="mps", **options)


# m, rows of w, columns of w, transpose, GPU, the kernels that must have run: one row per kernel
PRODUCTS = [
    (1, 70, 320, True, M1, ["qmv_{}"]),
    (2, 70, 320, True, M1, ["qmv_wide_{}_2"]),
    (3, 21, 128, True, M1, ["qmv_wide_{}_3"]),
    (4, 21, 128, True, M1, ["qmv_wide_{}_4"]),
    (5, 21, 128, True, M1, ["qmv_wide_{}_6"]),
    (7, 21, 128, True, M1, ["qmv_wide_{}_8"]),
    (13, 70, 320, True, M1, ["qmm_{}{of_32}"]),
    (32, 21, 320, True, M3_MAX, ["qmm_{}{of_32}"]),
    (13, 70, 1088, True, M3_MAX, ["qmm_{}{of_32}_partial", "sum_partials_{}"]),
    (37, 70, 320, True, M1, ["qmm_{}{of_64}"]),
    (70, 21, 320, True, M3_MAX, ["qmm_{}{of_64}"]),
    (37, 70, 1088, True, M3_MAX, ["qmm_{}{of_64}_partial", "sum_partials_{}"]),
    (37, 70, 1088, True, M1_MAX, ["qmm_{}{of_64}_partial", "sum_partials_{}"]),
    (1, 70, 320, False, M1, ["qvm_{}"]),
    (1, 1100, 320, False, M3_MAX, ["qvm_{}_partial", "sum_partials_{}"]),
    (37, 70, 320, False, M1, ["qmm_n_{}"]),
    (37, 1100, 320, False, M3_MAX, ["qmm_n_{}_partial", "sum_partials_{}"]),
]


# The same of tensor operations, which x of 16 bits takes on newer GPUs; a group size each.
TENSOR_PRODUCTS = [
    (9, 70, 320, True, 32, ["qmm_tensor_{}_32"]),
    (32, 21, 320, True, 64, ["qmm_tensor_{}_32"]),
    (37, 129, 128, True, 128, ["qmm_tensor_{}_64"]),
    (130, 70, 192, True, 64, ["qmm_tensor_{}_128"]),
    (13, 70, 1088, True, 64, ["qmm_tensor_{}_32_partial", "sum_partials_{}"]),
    (37, 70, 1088, True, 32, ["qmm_tensor_{}_64_partial", "sum_partials_{}"]),
    (70, 70, 1152, True, 128, ["qmm_tensor_{}_128_partial", "sum_partials_{}"]),
    (2, 70, 96, False, 32, ["qmm_n_tensor_{}_32"]),
    (32, 21, 320, False, 64, ["qmm_n_tensor_{}_32"]),
    (37, 129, 128, False, 128, ["qmm_n_tensor_{}_64"]),
    (130, 75, 192, False, 64, ["qmm_n_tensor_{}_128"]),
    (13, 1100, 64, False, 64, ["qmm_n_tensor_{}_32_partial", "sum_partials_{}"]),
    (37, 1100, 96, False, 32, ["qmm_n_tensor_{}_64_partial", "sum_partials_{}"]),
    (70, 1153, 128, False, 128, ["qmm_n_tensor_{}_128_partial", "sum_partials_{}"]),
]
TENSOR_DTYPES = (torch.float16, torch.bfloat16)

SORTED = {
    M1: ["qmm_sorted_{}{of_32}"],
    M3_MAX: ["qmm_sorted_{}{of_32}"],
    M5: ["qmm_sorted_tensor_{}{of_32}"],
}


def names(kernels, dtype, gpu):
    """The instances; tiles of 16 bits have their rows in their name, partial sums of float none."""
    small = dtype == torch.float16 or (dtype == torch.bfloat16 and gpu in (M3_MAX, M5))
    tiles = {f"of_{rows}": f"_{rows}" if small else "" for rows in (32, 64)}
    found = [k.format(FLOATS[dtype], **tiles) for k in kernels]
    if dtype == torch.float32:  # has no tensor operations
        found = [k.replace("_tensor", "") for k in found]
    return [k.removesuffix("_partial") if dtype == torch.float32 else k for k in found]


@pytest.mark.parametrize("schedule", [emulator.FORWARD, emulator.REVERSE, emulator.RANDOM])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m, rows, columns, transpose, gpu, kernels", PRODUCTS)
def test_every_product_kernel_is_accurate_under_every_schedule(
    m, rows, columns, transpose, gpu, kernels, dtype, schedule, monkeypatch
):
    monkeypatch.setenv("ONEBIT_FAKE_GPU", gpu)
    monkeypatch.setenv("ONEBIT_FAKE_SCHEDULE", str(schedule))
    log()
    packed, scales, biases = weights(rows, columns, group_size=64, dtype=dtype)
    x = torch.randn(m, columns if transpose else rows).to("mps", dtype)
    assert_qmm(x, packed, scales, biases, 64, transpose)
    expected = names(kernels, dtype, gpu)
    assert kernels_of(log())[: len(expected)] == expected


@pytest.mark.parametrize("schedule", [emulator.FORWARD, emulator.REVERSE, emulator.RANDOM])
@pytest.mark.parametrize("dtype", TENSOR_DTYPES)
@pytest.mark.parametrize("m, rows, columns, transpose, group_size, kernels", TENSOR_PRODUCTS)
def test_tensor_operations_are_accurate_under_every_schedule(
    m, rows, columns, transpose, group_size, kernels, dtype, schedule, monkeypatch
):
    monkeypatch.setenv("ONEBIT_FAKE_GPU", M5)
    monkeypatch.setenv("ONEBIT_FAKE_SCHEDULE", str(schedule))
    packed, scales, biases = weights(rows, columns, group_size=group_size, dtype=dtype)
    biases = None if m == 32 else biases
    x = torch.randn(m, columns if transpose else rows).to("mps", dtype)
    log()
    assert_qmm(x, packed, scales, biases, group_size, transpose)
    ran = kernels_of(log())  # of a first use, the tiles that are tried come before
    expected = [k.format(FLOATS[dtype]) for k in kernels]
    assert ran[-len(expected) - 1 : -1] == expected  # and plain torch after


def test_tensor_operations_take_batches_offsets_and_levels_of_another_dtype(monkeypatch):
    monkeypatch.setenv("ONEBIT_FAKE_GPU", M5)
    packed, scales, biases = weights(3, 21, 128, group_size=64)
    x = torch.randn(4, 12, 128).to("mps", torch.bfloat16)
    lhs, rhs = torch.tensor([0, 3, 1], device="mps"), torch.tensor([2, 0, 7], device="mps")
    log()
    y = ops.gather_qmm(x, packed, scales, biases, lhs, rhs, 64)
    assert kernels_of(log())[-1] == "qmm_tensor_bfloat_32"
    assert y[2].isnan().all()  # no matrix 7
    for i in range(2):
        w = (packed[rhs[i]], scales[rhs[i]], biases[rhs[i]])
        plain = torch_qmm(x[lhs[i]], *w, 64)
        exact = reference.qmm(*(to_numpy(t) for t in (x[lhs[i]], *w)), 64)
        assert_as_accurate_as_torch(y[i], plain, exact)
    assert_qmm(x[2], packed[1], scales[1], biases[1], 64)
    assert kernels_of(log())[-2] == "qmm_tensor_bfloat_32"


INF, NAN = float("inf"), float("nan")
# What is at columns 5 and 7 of a row of x.
NOT_FINITE = [(INF, 0), (-INF, 0), (INF, -INF), (NAN, 0), (INF, 3)]
# rows of x, GPU, transpose: one of each kernel of products
EVERY_PRODUCT = [
    *((1, M1, True), (4, M1, True), (13, M1, True), (37, M3_MAX, True), (13, M5, True)),
    *((1, M1, False), (37, M1, False), (37, M5, False)),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m, gpu, transpose", EVERY_PRODUCT)
def test_infinity_and_nan_in_x_are_as_in_torch(m, gpu, transpose, dtype, monkeypatch):
    monkeypatch.setenv("ONEBIT_FAKE_GPU", gpu)
    packed, scales, biases = weights(*((40, 128) if transpose else (128, 64)), group_size=32)
    biases[:20] = 0
    for values in NOT_FINITE:
        x = torch.zeros(m, 128, dtype=dtype)
        x[0, 5], x[0, 7] = torch.tensor(values).to(dtype)
        args = (packed, scales, biases, 32, transpose)
        y, plain = ops.qmm(x.to("mps"), *args), torch_qmm(x.to("mps"), *args)
        torch.testing.assert_close(y, plain, equal_nan=True, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("value", [2e37, 1e-38])
@pytest.mark.parametrize("m, gpu, transpose", EVERY_PRODUCT)
def test_extreme_values_neither_overflow_nor_vanish(value, m, gpu, transpose, monkeypatch):
    monkeypatch.setenv("ONEBIT_FAKE_GPU", gpu)
    packed, scales, biases = make_weights(128, 128)
    x = value * (1 + torch.rand(m, 128))
    scale = 1e-3 if value > 1 else 1e3
    args = (x, packed, scale * scales, scale * biases)
    expected = reference.qmm(*map(to_numpy, args), 128, transpose)
    assert abs(expected).max() < 3e38
    y = ops.qmm(*(t.to("mps") for t in args), 128, transpose)
    assert relative_error(y, expected) <= 1e-6


# Where a weight that is rounded, or a sum that cancels, shows most: x, levels, bits, group size.
STRUCTURED = [
    ("ones", "any", "random", 32, "errors of a kind add up"),
    ("ones", "lopsided", "random", 64, "the ratio of the levels is no float16"),
    ("ones", "lopsided", "random, clear at outliers", 128, "the same"),
    ("near 1", "symmetric", "random", 128, "a mean that cancels"),
    ("positive", "high is 0", "one clear", 128, "all but one value meet a level of 0"),
    ("positive", "low is 0", "one set", 64, "the same, the other level"),
    ("outliers of 65000.0", "low is 0", "random, clear at outliers", 128, "outliers meet 0"),
    ("outliers of 10000.0", "high is 0", "one clear elsewhere", 32, "the same, the other level"),
    ("outliers of 10000.0", "high is near 0", "random, set at outliers", 64, "nearly 0"),
    ("outliers among ones", "negative scale", "random", 128, "levels in the other order"),
    ("over many magnitudes", "one sign", "one set", 128, "x from 2^-12 to 2^5"),
    ("tiny", "symmetric", "random", 64, "subnormals of float16"),
    ("trained", "any", "random", 32, "activations of a trained network"),
]


# rows of x, GPU, transpose: of each kind of tiles of 16 bits
TILES = [(13, M3_MAX, True), (37, M3_MAX, True), (13, M5, True), (13, M5, False)]


@pytest.mark.parametrize("level_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m, gpu, transpose", TILES)
@pytest.mark.parametrize("x, levels, bits, group, why", STRUCTURED)
def test_tiles_keep_the_rule_on_structured_products(
    x, levels, bits, group, why, m, gpu, transpose, dtype, level_dtype, monkeypatch
):
    monkeypatch.setenv("ONEBIT_FAKE_GPU", gpu)
    n = 24 if transpose else 128
    case = Case(x, levels, bits, dtype, level_dtype, group, m, n, 256 // group, 5, transpose)
    error, plain, allowed = errors(case, device="mps")
    assert error <= allowed, f"torch {plain}"


# Few rows of float32: terms of one sign, whose roundings are the same in every lane. x, levels,
# bits, group size, groups, rows, why
ONE_SIGN = [
    ("a float16 number with all bits", "s = 2d, b = -d", "all clear", 64, 1, 1, "equal terms"),
    ("sorted", "high is 0", "rare", 64, 3, 1, "neighbours of one size"),
    ("0.3", "negative scale", "all clear", 128, 1, 2, "equal terms, two rows"),
    ("a float16 number with all bits", "low is near 0", "all clear", 128, 1, 5, "six rows"),
    ("sorted", "lopsided", "all clear", 128, 2, 7, "eight rows"),
    ("0.3", "high is near 0", "one clear", 128, 20, 3, "several words a lane"),
]


@pytest.mark.parametrize("x, levels, bits, group, groups, m, why", ONE_SIGN)
def test_few_rows_of_float32_keep_the_rule_on_terms_of_one_sign(
    x, levels, bits, group, groups, m, why
):
    ratios = []
    for seed in range(3):
        torch.manual_seed(seed)
        case = Case(x, levels, bits, torch.float32, torch.float16, group, m, 128, groups)
        error, _, allowed = errors(case, device="mps")
        ratios.append(error / allowed)
    assert max(ratios) <= 1, ratios


@pytest.mark.parametrize("gpu", SORTED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sorted_indices_share_a_pass_over_each_matrix(dtype, gpu, monkeypatch):
    monkeypatch.setenv("ONEBIT_FAKE_GPU", gpu)
    packed, scales, biases = weights(2, 70, 160, group_size=32, dtype=dtype)
    x = torch.randn(40, 1, 160).to("mps", dtype)
    rhs = torch.tensor([0] * 23 + [1] * 17, device="mps")
    log()
    y = ops.gather_qmm(x, packed, scales, biases, None, rhs, 32, True, True)
    assert kernels_of(log())[-1:] == names(SORTED[gpu], dtype, gpu)
    plain = torch.stack(
        [torch_qmm(x[i], packed[r], scales[r], biases[r], 32) for i, r in enumerate(rhs.tolist())]
    )
    arrays = [to_numpy(t) for t in (x, packed, scales, biases, None, rhs)]
    assert_as_accurate_as_torch(y, plain, reference.gather_qmm(*arrays, 32))


def test_every_kernel_of_the_library_runs_in_these_tests():
    """A host_name without a caller, or a caller's kernel without a table row, shows here."""
    library = emulator.Library(
        sorted(emulator.toolchain.SHADERS.glob("*.metal")), [emulator.toolchain.SHADERS]
    )
    covered = (
        {k for *_, gpu, kernels in PRODUCTS for t in FLOATS for k in names(kernels, t, gpu)}
        | {k for gpu in SORTED for t in FLOATS for k in names(SORTED[gpu], t, gpu)}
        | {
            k.format(FLOATS[t])
            for *_, kernels in TENSOR_PRODUCTS
            for t in TENSOR_DTYPES
            for k in kernels
        }
        | {
            f"{k}_{t}"
            for k in ("quantize", "decode", "affine_grad", *LEVEL_KERNELS)
            for t in FLOATS.values()
        }
        | {"flip_bits_float"}
    )
    assert set(library.kernels()) == covered


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("schedule", [emulator.FORWARD, emulator.RANDOM])
def test_quantize_dequantize_and_embedding_equal_the_cpu(dtype, group_size, schedule, monkeypatch):
    monkeypatch.setenv("ONEBIT_FAKE_SCHEDULE", str(schedule))
    w = torch.randn(37, 384).to(dtype)
    w[3], w[4, 5], w[5, 6], w[6] = -0.0, float("inf"), float("nan"), float("nan")
    w[7, ::2], w[7, 1::2] = 0.0, -0.0  # the first zero gives the sign
    w[8] = w[8].abs().neg()  # all negative: the maximum must not start at 0
    w[9, ::2], w[9, 1::2], w[9, 7] = 1.0, 0.0, 0.5  # a tie is 0
    log()
    results = [ops.quantize(t, group_size) for t in (w, w.to("mps"))]
    assert kernels_of(log()) == [f"quantize_{FLOATS[dtype]}"]
    for cpu, mps in zip(*results, strict=True):
        same_bits(cpu, mps)
    ids = torch.tensor([[0, 36], [5, 5], [4, 6]])
    for biases in (True, False):
        args = [[p, s, b if biases else None, group_size] for p, s, b in results]
        same_bits(ops.dequantize(*args[0]), ops.dequantize(*args[1]))
        same_bits(ops.embedding(ids, *args[0]), ops.embedding(ids.to("mps"), *args[1]))
        assert kernels_of(log()) == [f"decode_{FLOATS[dtype]}"] * 2


def same_bits(a, b):
    a, b = a.cpu(), b.cpu()
    if a.is_floating_point():
        assert torch.equal(a.isnan(), b.isnan())
        bits = torch.int32 if a.element_size() == 4 else torch.int16
        a, b = (t.nan_to_num(nan=1.0).view(bits) for t in (a, b))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_affine_grad_sums_what_the_cpu_sums(dtype, transpose, group_size):
    packed, *_ = weights(21, 384, group_size=group_size)
    k, n = (384, 21) if transpose else (21, 384)
    x, grad = torch.randn(5, k).to(dtype), torch.randn(5, n).to(dtype)
    exact = ops.affine_grad(
        grad.double(), x.double(), packed.cpu(), None, None, group_size, transpose
    )
    ours = ops.affine_grad(grad.to("mps"), x.to("mps"), packed, None, None, group_size, transpose)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.cpu().double(), b, rtol=2e-6, atol=2e-5)


def test_affine_grad_of_gather_adds_up_the_rows_of_each_matrix():
    packed, *_ = weights(3, 21, 128, group_size=32)
    x, grad = torch.randn(4, 2, 128), torch.randn(5, 2, 21)
    lhs, rhs = torch.tensor([0, 3, 1, 1, 2]), torch.tensor([2, 0, 2, 2, 0])
    exact = ops.affine_grad(grad.double(), x.double(), packed.cpu(), lhs, rhs, 32)
    ours = ops.affine_grad(*(t.to("mps") for t in (grad, x, packed, lhs, rhs)), 32)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=2e-6, atol=2e-5)
        assert not a[1].any()  # a matrix no row chose


@pytest.mark.parametrize("m", [1, 4, 12])
@pytest.mark.parametrize("dtype", FLOATS)
def test_contiguous_x_that_is_not_aligned(m, dtype):
    packed, scales, biases = weights(40, 256)
    x = torch.randn(m * 256 + 1).to("mps", dtype)[1:].view(m, 256)
    assert x.is_contiguous() and x.storage_offset() == 1
    assert_qmm(x, packed, scales, biases, 128)


def test_storage_offsets_of_every_argument():
    packed, scales, biases = weights(3, 40, 256)
    x = torch.randn(5, 4, 256, device="mps")
    assert_qmm(x[2], packed[1], scales[1], biases[1], 128)


def test_two_calls_in_a_row_use_one_pipeline():
    packed, scales, biases = weights(40, 256)
    x = torch.randn(1, 256, device="mps")
    first = ops.qmm(x, packed, scales, biases, 128)
    assert torch.equal(first, ops.qmm(x, packed, scales, biases, 128))


@pytest.mark.parametrize("argument", range(4))
def test_one_tensor_on_the_cpu_is_an_error(argument):
    arguments = [torch.randn(1, 256, device="mps"), *weights(40, 256)]
    arguments[argument] = arguments[argument].cpu()
    with pytest.raises(ValueError, match=r"must be on (cpu|mps:0) as the others, got (cpu|mps:0)"):
        ops.qmm(*arguments, 128)


def test_an_index_out_of_range_gives_nan_and_touches_nothing_else():
    packed, scales, biases = weights(3, 40, 128)
    x = torch.randn(4, 1, 128, device="mps")
    for bad in (3, -1, 2**40):
        rhs = torch.tensor([0, bad, 2, 1], device="mps")
        for transpose in (True, False):
            inputs = x if transpose else x[..., :40].contiguous()
            y = ops.gather_qmm(inputs, packed, scales, biases, None, rhs, 128, transpose)
            assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any()
        rows = ops.embedding(rhs, packed[0], scales[0], biases[0], 128)
        assert rows[1].isnan().all() == (bad != 3) and not rows[0].isnan().any()
    sorted_rhs = torch.tensor([0] * 20 + [1] * 20 + [7] * 3, device="mps")
    many = torch.randn(43, 1, 128, device="mps")
    y = ops.gather_qmm(many, packed, scales, biases, None, sorted_rhs, 128, True, True)
    assert y[40:].isnan().all() and not y[:40].isnan().any()


def test_gradients_on_mps_equal_those_on_the_cpu():
    packed, scales, biases = make_weights(40, 256, group_size=64)
    x = torch.randn(6, 256)
    grads = []
    for device in ("cpu", "mps"):
        leaves = [t.detach().to(device).requires_grad_() for t in (x, scales, biases)]
        y = ops.qmm(leaves[0], packed.to(device), *leaves[1:], 64)
        y.square().sum().backward()
        grads.append([t.grad.cpu() for t in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_opcheck_on_mps():
    packed, scales, biases = weights(40, 256)
    x = torch.randn(3, 256, device="mps", requires_grad=True)
    # torch's autograd registration check knows no mps; it runs on the CPU.
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (x, packed, scales, biases, 128)
    torch.library.opcheck(ops.qmm.default, arguments, test_utils=utilities)


def test_compiled_graph_on_mps():
    packed, scales, biases = weights(40, 256)
    x = torch.randn(3, 256, device="mps")
    compiled = torch.compile(
        lambda x: ops.qmm(x, packed, scales, biases, 128) * 2, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x), ops.qmm(x, packed, scales, biases, 128) * 2)


def test_autocast_on_mps():
    packed, scales, biases = weights(40, 256)
    x = torch.randn(3, 256, device="mps")
    with torch.autocast("mps", dtype=torch.float16):
        y = ops.qmm(x, packed, scales, biases, 128)
    assert y.dtype == torch.float16


def test_random_bits_of_a_new_layer_are_drawn_on_the_cpu():
    class NoDraws(TorchDispatchMode):  # of 32 bits, which MPS does not draw
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            draws = func._schema.name == "aten::random_"
            assert not draws or args[0].device.type == "cpu"
            return func(*args, **(kwargs or {}))

    with NoDraws():
        layer = OneBitLinear(64, 32, device="mps")
    assert len(layer.weight.unique()) > 60


def test_flushed_subnormals_change_no_bit_of_quantize():
    """Apple GPUs may flush subnormal floats; the kernel compares them as integers."""
    import numpy as np

    library = emulator.Library(
        sorted(emulator.toolchain.SHADERS.glob("*.metal")), [emulator.toolchain.SHADERS]
    )
    w = np.array([1e-40, -2e-41, 3e-39, 1e-45] * 32, np.float32)
    w[64:] *= 0.5
    packed, scales, biases = (
        np.zeros(4, np.uint32),
        np.zeros(4, np.float32),
        np.zeros(4, np.float32),
    )
    params = np.array([4, 1], np.uint32)
    library.set_constant(3, np.uint32(1))  # words of a group
    library.run(
        "quantize_float", {0: w, 4: params}, {1: packed, 2: scales, 3: biases}, (1,), (256,),
        flush_denormals=True,
    )  # fmt: skip
    expected = ops.quantize(torch.from_numpy(w), 32)
    assert np.array_equal(packed, expected[0].numpy().view(np.uint32))
    assert np.array_equal(scales.view(np.uint32), expected[1].numpy().view(np.uint32))
    assert np.array_equal(biases.view(np.uint32), expected[2].numpy().view(np.uint32))


# What a call launches besides its kernel: each costs as much time as a small product.
HELPERS = {
    "two dimensions": (0, lambda x, *w: ops.qmm(x[0, 0], *(t[0] for t in w), 64)),
    "x in two batches, one matrix": (0, lambda x, *w: ops.qmm(x, *(t[0] for t in w), 64)),
    "storage offsets": (0, lambda x, *w: ops.qmm(x[1, 1], *(t[1] for t in w), 64)),
    "no biases": (0, lambda x, p, s, b: ops.qmm(x[0, 0], p[0], s[0], None, 64)),
    "x apart: a copy": (1, lambda x, *w: ops.qmm(x[0, 0].mT.clone().mT, *(t[0] for t in w), 64)),
    "a matrix for each batch": (0, lambda x, *w: ops.qmm(x[0], *w, 64)),
    "matrices shared by batches": (0, lambda x, *w: ops.qmm(x, *w, 64)),
    "gather": (0, lambda x, *w: ops.gather_qmm(x[0], *w, None, INDEX, 64)),
    "gather, both": (0, lambda x, *w: ops.gather_qmm(x[0], *w, INDEX, INDEX, 64)),
    "gather by int32: a conversion": (
        1,
        lambda x, *w: ops.gather_qmm(x[0], *w, INT_INDEX, INDEX, 64),
    ),
    "embedding": (0, lambda x, p, s, b: ops.embedding(INDEX, p[0], s[0], b[0], 64)),
    "dequantize": (0, lambda x, *w: ops.dequantize(*w, 64)),
    "quantize": (0, lambda x, *w: ops.quantize(x, 64)),
}
INDEX = torch.tensor([1, 0], device="mps")
INT_INDEX = INDEX.int()


@pytest.mark.parametrize("call", HELPERS)
def test_operators_launch_their_kernel_and_nothing_else(call):
    expected, op = HELPERS[call]
    packed, scales, biases = weights(2, 40, 128, group_size=64)
    x = torch.randn(2, 2, 3, 128, device="mps")
    torch.ops.onebit_fake.take_helpers()
    log()
    op(x, packed, scales, biases)
    assert len(kernels_of(log())) == 1
    assert torch.ops.onebit_fake.take_helpers() == expected


# dimensions of batches of x, of w, why
BROADCASTS = [
    ((6,), (1,), "one matrix"),
    ((2, 3), (3,), "w repeats as a whole"),
    ((2, 3), (2, 1), "each of w three times"),
    ((1, 3), (2, 1), "both repeat"),
    ((1, 1), (2, 3), "one of x"),
    ((2, 1, 3), (2, 1), "x repeats between two of its dimensions: no formula"),
    ((2, 1, 1), (3, 2), "w repeats before, x within"),
]


@pytest.mark.parametrize("of_x, of_w, why", BROADCASTS)
def test_matrices_are_broadcast_as_on_the_cpu(of_x, of_w, why):
    packed, scales, biases = (
        t.view(*of_w, 8, -1) for t in weights(math.prod(of_w) * 8, 64, group_size=64)
    )
    x = torch.randn(*of_x, 2, 64).to("mps")
    arguments = (x, packed, scales, biases)
    expected = ops.qmm(*(t.cpu() for t in arguments), 64)
    torch.testing.assert_close(ops.qmm(*arguments, 64).cpu(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(expected.shape)
    rest = (None, None, 64)
    levels = ops.affine_grad(grad, x.cpu(), packed.cpu(), *rest)
    ours = ops.affine_grad(grad.to("mps"), x, packed, *rest)
    for a, b in zip(ours, levels, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-4)
