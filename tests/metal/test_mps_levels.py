"""Quantizing by a rule and fake quantization on MPS: the CPU's results, and what a defect does."""

import copy

import emulator
import pytest
import torch
from test_mps import FLOATS, kernels_of, log, same_bits
from torch.library import opcheck

from torch_onebit import QATLinear
from torch_onebit.ops import RULES, levels_composite

ops = torch.ops.onebit
FLOAT, HALF, BFLOAT = FLOATS
FORWARD, REVERSE, RANDOM = emulator.FORWARD, emulator.REVERSE, emulator.RANDOM

# rule, group size, dtype of w, of results and gradients, schedule: each with each other once
CASES = [
    ("minmax", 32, FLOAT, BFLOAT, FORWARD),
    ("minmax", 64, HALF, HALF, RANDOM),
    ("minmax", 128, BFLOAT, FLOAT, REVERSE),
    ("sign", 32, HALF, FLOAT, REVERSE),
    ("sign", 64, BFLOAT, BFLOAT, FORWARD),
    ("sign", 128, FLOAT, HALF, RANDOM),
    ("mean", 32, BFLOAT, HALF, RANDOM),
    ("mean", 64, FLOAT, FLOAT, REVERSE),
    ("mean", 128, HALF, BFLOAT, FORWARD),
    ("optimal", 32, FLOAT, BFLOAT, RANDOM),
    ("optimal", 64, HALF, FLOAT, FORWARD),
    ("optimal", 128, FLOAT, HALF, REVERSE),
    ("optimal", 128, BFLOAT, BFLOAT, FORWARD),
]


def on_mps(*arguments):
    return [a.to("mps") if isinstance(a, torch.Tensor) else a for a in arguments]


def pairs(op, *arguments, **options):
    """What op returns on the CPU and on mps, tensor by tensor, of one dtype and shape."""
    results = [op(*arguments, **options), op(*on_mps(*arguments), **options)]
    results = [r if isinstance(r, tuple) else (r,) for r in results]
    for cpu, mps in zip(*results, strict=True):
        assert (cpu.dtype, cpu.shape) == (mps.dtype, mps.shape)
        yield cpu, mps.cpu()


def assert_same_on_mps(op, *arguments, **options) -> None:
    for cpu, mps in pairs(op, *arguments, **options):
        same_bits(cpu, mps)


def assert_close_on_mps(op, *arguments) -> None:
    """For sums of products, which CPUs with and without fused multiply-add round differently."""
    for cpu, mps in pairs(op, *arguments):
        tolerance = 8 * torch.finfo(cpu.dtype).eps if cpu.is_floating_point() else 0
        torch.testing.assert_close(mps, cpu, rtol=tolerance, atol=tolerance, equal_nan=True)


def awkward_weights(rule, *shape) -> torch.Tensor:
    """Random rows, and rows of every kind that decides a tie, a sign or an empty side."""
    w = torch.randn(*shape)
    rows = w.view(-1, shape[-1])
    rows[0], rows[1] = 0.0, 3.0
    rows[2, ::2], rows[2, 1::2] = 0.0, -0.0  # the first zero gives the sign
    rows[3], rows[4] = rows[3].abs() + 100, -rows[4].abs()
    rows[5] = rows[5].round()  # ties
    rows[6] = (rows[6] > 1).float() * 0.7 - 0.2  # two values already
    rows[7, 3] = rows[7, 40] = float("inf")
    rows[8, 5] = float("-inf")
    if rule != "optimal":  # spoils both levels there, and the bits say nothing
        rows[9, 7] = rows[10, 0] = float("nan")
    return w


@pytest.mark.parametrize("rule, group_size, dtype, other, schedule", CASES)
def test_levels_and_bits_are_those_of_the_cpu(
    rule, group_size, dtype, other, schedule, monkeypatch
):
    monkeypatch.setenv("ONEBIT_FAKE_SCHEDULE", str(schedule))
    w = awkward_weights(rule, 2, 7, 256).to(dtype)
    log()
    assert_same_on_mps(ops.quantize_levels, w, rule, group_size)
    assert_same_on_mps(ops.fake_quantize, w, rule, group_size, dtype=other)
    names = ["quantize_levels", "fake_quantize"]
    assert kernels_of(log()) == [f"{name}_{FLOATS[dtype]}" for name in names]


@pytest.mark.parametrize("rule, group_size, dtype, other, schedule", CASES)
def test_gradients_are_those_of_the_cpu(rule, group_size, dtype, other, schedule, monkeypatch):
    monkeypatch.setenv("ONEBIT_FAKE_SCHEDULE", str(schedule))
    w = awkward_weights(rule, 2, 7, 256).to(dtype)
    grad = torch.randn(2, 7, 256).to(other)
    log()
    check = assert_close_on_mps if rule == "mean" else assert_same_on_mps
    check(ops.fake_quantize_backward, grad, w, rule, group_size)
    assert kernels_of(log()) == [f"fake_quantize_backward_{FLOATS[dtype]}"]


@pytest.mark.parametrize("rule", RULES)
def test_a_group_that_begins_with_nan_is_nan_and_spoils_no_other(rule):
    w = torch.randn(3, 64)
    w[0, 0], w[1] = float("nan"), float("nan")
    results = [ops.fake_quantize(t, rule, 64).cpu() for t in (w, w.to("mps"))]
    for result in results:
        assert result[0].isnan().any() and result[1].isnan().all()
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("rule", ["sign", "optimal"])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("shape", [(256,), (5, 256)], ids=["per column", "per value"])
def test_importance_weighs_as_on_the_cpu(rule, group_size, shape):
    w, importance = torch.randn(5, 256), (torch.rand(shape) + 0.1).half()
    importance[..., :group_size] = 0  # matters to nobody: cut as if all its values mattered
    importance[..., -20:] = 0
    assert_close_on_mps(ops.quantize_levels, w, rule, group_size, importance)


# group size, dtype of w, of results and gradients, of levels
AFFINE_CASES = [
    (32, FLOAT, BFLOAT, FLOAT),
    (64, FLOAT, HALF, HALF),
    (128, HALF, FLOAT, BFLOAT),
    (128, BFLOAT, BFLOAT, FLOAT),
]


@pytest.mark.parametrize("schedule", [FORWARD, RANDOM])
@pytest.mark.parametrize("group_size, dtype, other, levels", AFFINE_CASES)
def test_free_levels_as_on_the_cpu(group_size, dtype, other, levels, schedule, monkeypatch):
    monkeypatch.setenv("ONEBIT_FAKE_SCHEDULE", str(schedule))
    w, grad = torch.randn(2, 7, 256).to(dtype), torch.randn(2, 7, 256).to(other)
    scales, biases = torch.randn(2, 2, 7, 256 // group_size).to(levels)  # scales of either sign
    w[0, 0, 3], scales[0, 1, 0], biases[0, 2, 0] = float("nan"), float("inf"), float("nan")
    w[0, 3], scales[0, 3], biases[0, 3] = 0.5, 1.0, 0.0  # halfway: the lower level
    w[0, 4], scales[0, 4], biases[0, 4] = -0.5, -1.0, 0.0  # halfway: the bias
    arguments = (w, scales, biases, group_size)
    log()
    assert_same_on_mps(ops.fake_quantize_affine, *arguments, dtype=other)
    assert_same_on_mps(ops.fake_quantize_affine_backward, grad, *arguments)
    names = ["fake_quantize_affine", "fake_quantize_affine_backward"]
    assert kernels_of(log()) == [f"{name}_{FLOATS[dtype]}" for name in names]


@pytest.mark.parametrize("schedule", [FORWARD, RANDOM])
@pytest.mark.parametrize("group_size, begin, end", [(32, 0, 128), (64, 10, 77), (128, 100, 101)])
def test_bits_flip_as_on_the_cpu(group_size, begin, end, schedule, monkeypatch):
    monkeypatch.setenv("ONEBIT_FAKE_SCHEDULE", str(schedule))
    check_flips(group_size, begin, end)


def check_flips(group_size: int, begin: int, end: int) -> None:
    x = torch.randn(200, 128)
    moments, error = x.t() @ x / 200, torch.randn(128, 11).t()
    scales = torch.rand(11, 256 // group_size)[:, ::2]
    results = []
    for device in ("cpu", "mps"):
        bits = (torch.arange(12 * 128) % 3 == 0).view(12, 128).to(device)[1:]
        arguments = [t.to(device) for t in (error, scales, moments)]
        changes = ops.flip_bits_(bits, *arguments, begin, end, group_size)
        results.append((bits.cpu(), changes.cpu()))
    assert (results[0][1] != 0).any() and (results[0][1] == 0).any()
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1])


def check_rounding() -> None:
    """The second flip is a tie, unless the product that is taken from its error is not rounded."""
    moments, error = torch.eye(32), torch.zeros(1, 32)
    moments[0, 1] = 1 + 2.0**-23  # times 3, rounds up
    error[0, 0], error[0, 1] = 10, 4.5 + 2.0**-21
    results = []
    for device in ("cpu", "mps"):
        bits = torch.zeros(1, 32, dtype=torch.bool, device=device)
        arguments = [t.to(device) for t in (error, torch.full((1, 1), 3.0), moments)]
        ops.flip_bits_(bits, *arguments, 0, 32, 32)
        results.append(bits.cpu())
    assert torch.equal(*results) and results[0].sum() == 1


def test_a_product_is_rounded_before_it_is_added():
    check_rounding()


LAYOUTS = {
    "one dimension": lambda t: t[0, 0, :128],
    "four dimensions": lambda t: t[:, None],
    "a storage offset": lambda t: t[1],
    "not aligned": lambda t: t.flatten()[3:1283].view(-1, 128),
    "rows swapped": lambda t: t.transpose(0, 1),
    "every other column": lambda t: t[..., ::2],
    "nothing": lambda t: t[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_what_the_cpu_does(layout):
    view = LAYOUTS[layout]
    w, grad = torch.randn(2, 2, 5, 256)
    levels = torch.rand(*view(w).shape[:-1], view(w).shape[-1] // 64)
    results = []
    for device in ("cpu", "mps"):
        v, g = view(w.to(device)), view(grad.to(device))
        scales = levels.to(device)
        biases = scales * -0.4
        results.append(
            [
                *ops.quantize_levels(v, "mean", 64),
                ops.fake_quantize(v, "mean", 64),
                ops.fake_quantize_backward(g, v, "sign", 64),
                ops.fake_quantize_affine(v, scales, biases, 64),
                *ops.fake_quantize_affine_backward(g, v, scales, biases, 64),
            ]
        )
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        same_bits(a, b)


@pytest.mark.parametrize("rule", [*RULES, "learnable"])
def test_a_layer_trains_on_mps_as_on_the_cpu(rule):
    start, x = QATLinear(torch.nn.Linear(128, 8), method=rule, group_size=64), torch.randn(3, 128)
    gradients = []
    for device in ("cpu", "mps"):
        layer = copy.deepcopy(start).to(device)
        layer(x.to(device)).square().sum().backward()
        gradients.append([p.grad.cpu() for p in layer.parameters()])
    assert len(gradients[0]) == (4 if rule == "learnable" else 2)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [op.__name__ for op in levels_composite._OPS])
def test_opcheck_on_mps_and_nothing_is_announced(name, monkeypatch):
    monkeypatch.setattr(levels_composite, "_announced", announced := set())
    w, levels = torch.randn(4, 64, device="mps"), torch.rand(4, 2, device="mps")
    arguments = {
        "quantize_levels": (w, "optimal", 32, torch.rand(64, device="mps")),
        "fake_quantize": (w, "mean", 32),
        "fake_quantize_backward": (w, w, "minmax", 32),
        "fake_quantize_affine": (w, levels, levels, 32),
        "fake_quantize_affine_backward": (w, w, levels, levels, 32),
        "flip_bits_": (w > 0, w, levels, torch.rand(64, 64, device="mps"), 0, 32, 32),
        "descend_": (w > 0, w, levels, torch.rand(64, 64, device="mps"), 2, 32),
    }[name]
    # torch's autograd registration check knows no mps; it runs on the CPU.
    utilities = ("test_schema", "test_faketensor")
    opcheck(getattr(ops, name).default, arguments, test_utils=utilities)
    assert not announced


W, LEVELS = torch.randn(4, 64, device="mps"), torch.rand(4, 2, device="mps")


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: ops.fake_quantize(W, "mean", 32, dtype=torch.float64),
            "dtype must be float32, float16 or bfloat16 on mps, got Double",
        ),
        (
            lambda: ops.fake_quantize_affine(W, LEVELS, LEVELS, 32, dtype=torch.float64),
            "dtype must be float32, float16 or bfloat16 on mps, got Double",
        ),
        (
            lambda: ops.fake_quantize_backward(W.cpu(), W, "mean", 32),
            "grad must be on mps:0 as the others, got cpu",
        ),
        (
            lambda: ops.quantize_levels(W, "sign", 32, torch.rand(64)),
            "importance must be on mps:0 as the others, got cpu",
        ),
        (
            lambda: ops.fake_quantize_affine(W, LEVELS, LEVELS.cpu(), 32),
            "biases must be on mps:0 as the others, got cpu",
        ),
        (lambda: ops.fake_quantize(W, "median", 32), "rule must be .*, got median"),
    ],
)
def test_illegal_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("rule", RULES)
def test_weights_and_gradients_are_read_once(rule, monkeypatch):
    monkeypatch.setenv("ONEBIT_FAKE_TRAFFIC", "1")
    w, grad = torch.randn(2, 16, 128, device="mps")
    scales = torch.rand(16, 1, device="mps")
    size = w.nbytes

    def read(call) -> dict[int, int]:
        log()
        call()
        (line,) = [step for step in log() if step != "commit"]
        counts = [c.split(":") for c in line.split()[3:] if not c.startswith("banks")]
        return {int(buffer): int(size) for buffer, size, _ in counts}

    assert read(lambda: ops.quantize_levels(w, rule, 128))[0] == size
    assert read(lambda: ops.fake_quantize(w, rule, 128))[0] == size
    counts = read(lambda: ops.fake_quantize_backward(grad, w, rule, 128))
    assert counts[0] == counts[1] == size
    assert read(lambda: ops.fake_quantize_affine(w, scales, scales, 128))[0] == size
    counts = read(lambda: ops.fake_quantize_affine_backward(grad, w, scales, scales, 128))
    assert counts[0] == counts[1] == size


# A defect in the shaders, and the file it is made in: the line before, the line after.
MUTANTS = {
    "no end of the groups": ("levels.metal", "if (group >= p.groups) return;", ""),
    "importance does not repeat": ("levels.metal", "group % p.period", "group"),
    "every lane writes the scale": (
        "levels.metal",
        "  if (lane == 0) {\n    scales",
        "  {\n    scales",
    ),
    "importance of zeros counts": ("levels.metal", "group_sum(given, lane) > 0", "true"),
    "a zero keeps its sign": ("levels.metal", "low = 0.0f + levels.low", "low = levels.low"),
    "sums in an order of their own": (
        "group.h",
        "sum += lane < 16 ? term[i] : other;\n    sum += lane < 16 ? other : term[i];",
        "sum += term[i] + other;",
    ),
    "half of a sum": ("group.h", "ushort width = 8", "ushort width = 4"),
    "the last of equals": (
        "group.h",
        "uint i = kGroupWords; i-- > 0;",
        "uint i = 0; i < kGroupWords; i++",
    ),
    "zeros are ordered by sign": ("group.h", "? -magnitude", "? ~magnitude"),
    "values of another group": ("group.h", "(group * kGroupWords + i)", "(group + i)"),
    "equal values are lost in sorting": (
        "best_cut.h",
        "keeps_less ? other < values[i] : values[i] < other",
        "keeps_less == (other < values[i])",
    ),
    "importance is not sorted along": (
        "best_cut.h",
        "? other_weight : weights[i]",
        "? weights[i] : weights[i]",
    ),
    "the wrong word across": (
        "best_cut.h",
        "value[i ^ 1] : value[i ^ 2]",
        "value[i ^ 1] : value[i ^ 1]",
    ),
    "sums without their own value": ("best_cut.h", "l == lane ?", "l + 1 == lane ?"),
    "a cut after the last value": ("best_cut.h", "if (at == size - 1) score[i] = NAN;", ""),
    "an empty side keeps its level": ("best_cut.h", "low_mass > 0 ? low : high", "low"),
    "means from the middle": ("best_cut.h", "(value, size - 1)", "(value, size / 2)"),
    "ties are 1": ("levels.h", "levels.origin > levels", "levels.origin >= levels"),
    "NaN is skipped everywhere": ("levels.h", "isnan(value_at(value, 0))", "false"),
    "the mean moves no weight": ("levels.h", "if (rule_is(Rule::kMean)) shift", "if (false) shift"),
    "both levels move alike": ("levels.h", "(high - low) / count", "(high + low) / count"),
    "one side's mean for both": ("levels.h", "? to_high : to_low", "? to_high : to_high"),
    "a negative scale like a positive": ("fake_quantize_affine.metal", "scale < 0 ?", "false ?"),
    "all of the gradient is the scale's": (
        "fake_quantize_affine.metal",
        "? through[i] : 0.0f",
        "? through[i] : through[i]",
    ),
    "a flip that no other column sees": ("flip_bits.metal", "if (d == 0) continue;", "continue;"),
    "bits that do not follow": ("flip_bits.metal", "bits[at] = !bits[at];", ""),
    "fused multiply-adds": ("common.h", "#pragma METAL fp contract(off)", ""),
    "every lane decides": ("flip_bits.metal", "if (lane == j % kLanes) {", "{"),
}


def everything() -> None:
    """All of the operators in float32, on more groups than a threadgroup has simdgroups."""
    torch.manual_seed(0)
    grad, importance = torch.randn(17, 128), torch.rand(128)
    importance[64:96] = 0
    one = torch.eye(128)[77]  # the greatest of its group in one row, within it in the others
    for rule in RULES:
        w = awkward_weights(rule, 17, 128)
        assert_same_on_mps(ops.quantize_levels, w, rule, 128)
        assert_same_on_mps(ops.fake_quantize, w, rule, 128)
        assert_close_on_mps(ops.fake_quantize_backward, grad, w, rule, 128)
    w[3, 77] = 200.0
    for h in (importance, one, importance * 0):
        assert_close_on_mps(ops.quantize_levels, w[2:7], "optimal", 32, h)
    scales, biases = torch.randn(2, 17, 1)
    assert_same_on_mps(ops.fake_quantize_affine, w, scales, biases, 128)
    assert_same_on_mps(ops.fake_quantize_affine_backward, grad, w, scales, biases, 128)
    check_flips(32, 10, 77)
    check_rounding()


def broken(folder, file: str, before: str, after: str) -> str:
    """The emulated kernels after a change to one of the shaders."""
    shaders = emulator.broken_shaders(folder, file, before, after)
    names = ("levels", "fake_quantize_affine", "flip_bits")
    return str(emulator.build([shaders / f"{name}.metal" for name in names]))


def test_the_shaders_without_a_defect_pass(tmp_path, monkeypatch):
    same = ("group.h", "inline", "inline")
    monkeypatch.setenv("ONEBIT_EMULATOR", broken(tmp_path, *same))
    everything()


@pytest.mark.parametrize("defect", MUTANTS)
def test_a_defect_in_the_shaders_is_found(defect, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEBIT_EMULATOR", broken(tmp_path, *MUTANTS[defect]))
    with pytest.raises((AssertionError, RuntimeError)):
        everything()
