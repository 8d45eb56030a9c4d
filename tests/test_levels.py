"""quantize_levels and fake_quantize against their formulae, flip_bits_ against the loss."""

import pytest
import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import gradcheck
from torch.library import opcheck

from torch_onebit.ops import RULES
from torch_onebit.packing import unpack_bits

ops = torch.ops.onebit


def groups_of(w: Tensor, group_size: int) -> Tensor:
    return w.unflatten(-1, (-1, group_size))


def levels(w: Tensor, bits: Tensor, rule: str, group_size: int) -> tuple[Tensor, Tensor]:
    """(low, high) of each group ``[..., 1]`` by the rule's formula, differentiable in w."""
    v, b = groups_of(w, group_size), groups_of(bits, group_size).to(w.dtype)
    if rule == "minmax":
        return v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
    if rule == "sign":
        high = v.abs().mean(-1, keepdim=True)
        return -high, high
    if rule == "mean":
        mean = v.mean(-1, keepdim=True)
        deviation = (v - mean).abs().mean(-1, keepdim=True)
        return mean - deviation, mean + deviation
    means = [(v * side).sum(-1, keepdim=True) / side.sum(-1, keepdim=True) for side in (1 - b, b)]
    return means[0], means[1]


def decoded(w: Tensor, rule: str, group_size: int, importance: Tensor | None = None) -> Tensor:
    return ops.dequantize(*ops.quantize_levels(w, rule, group_size, importance), group_size)


def binary(w: Tensor, bits: Tensor, rule: str, group_size: int) -> Tensor:
    """The 1-bit weights with these bits frozen."""
    low, high = levels(w, bits, rule, group_size)
    return torch.where(groups_of(bits, group_size), high, low).flatten(-2)


def least_error(values: Tensor, weights: Tensor) -> float:
    """The best two-level squared error of one group, by trying every cut."""
    order = values.argsort()
    v, h = values[order].double(), weights[order].double()
    errors = []
    for cut in range(1, len(v)):
        error = 0.0
        for part in (slice(0, cut), slice(cut, None)):
            mean = (v[part] * h[part]).sum() / h[part].sum().clamp_min(1e-300)
            error += float((h[part] * (v[part] - mean) ** 2).sum())
        errors.append(error)
    return min(errors)


# rule, group size, dtype: every rule, every size and every dtype once with each other's neighbour
CASES = [
    ("minmax", 32, torch.float32),
    ("sign", 64, torch.float32),
    ("mean", 128, torch.float32),
    ("optimal", 64, torch.float32),
    ("optimal", 32, torch.float64),
    ("optimal", 128, torch.bfloat16),
    ("mean", 32, torch.float16),
    ("sign", 128, torch.bfloat16),
    ("minmax", 64, torch.float64),
]


@pytest.mark.parametrize("rule, group_size, dtype", CASES)
def test_levels_follow_the_formula(rule, group_size, dtype, isa, device):
    # 37 * 2 or more groups: whole tiles of 16 and a rest.
    w = torch.randn(37, 256, dtype=dtype)
    packed, scales, biases = ops.quantize_levels(w.to(device), rule, group_size)
    expected = binary(w.double(), unpack_bits(packed.cpu()), rule, group_size)
    assert packed.dtype == torch.int32 and scales.dtype == biases.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    actual = ops.dequantize(packed, scales, biases, group_size)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    fake = ops.fake_quantize(w.to(device), rule, group_size)
    torch.testing.assert_close(fake.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES)
def test_bits_are_on_the_nearer_side(rule):
    w = torch.randn(8, 128, dtype=torch.float64)
    bits = unpack_bits(ops.quantize_levels(w, rule, 32)[0])
    low, high = levels(w, bits, rule, 32)
    nearer = groups_of(w, 32) - low > high - groups_of(w, 32)
    assert torch.equal(nearer.flatten(-2), bits)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("weighted", [False, True, "the small ones"])
def test_optimal_is_the_least_squared_error(group_size, weighted, isa):
    w = torch.randn(3, 256)
    w[0, :group_size] = w[0, :group_size].round()  # ties
    w[1, :group_size] = w[1, :group_size].abs() + 100  # far from zero
    importance = torch.rand(256) ** 4 if weighted else None
    if weighted == "the small ones":
        w, importance = w.sort(-1).values, importance * (torch.arange(256) % group_size < 20)
    error = (decoded(w.double(), "optimal", group_size, importance) - w) ** 2
    weights = torch.ones_like(w) if importance is None else importance.expand_as(w)
    for got, values, h in zip(
        groups_of(error * weights, group_size).flatten(0, 1),
        groups_of(w, group_size).flatten(0, 1),
        groups_of(weights, group_size).flatten(0, 1),
        strict=True,
    ):
        assert float(got.sum()) <= least_error(values, h) * (1 + 1e-6) + 1e-12


def test_minmax_has_the_bits_of_quantize(isa, device):
    w = torch.randn(16, 256).to(device)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ops.quantize_levels(w, "minmax", 64), ops.quantize(w, 64), strict=True)
    )


@pytest.mark.parametrize("rule", ["sign", "mean", "optimal"])
@pytest.mark.parametrize(
    "name, w", [("zeros", torch.zeros(1, 32)), ("equal", torch.full((1, 32), 3.0))]
)
def test_equal_weights_are_kept(rule, name, w, device):
    assert torch.equal(decoded(w.to(device), rule, 32).cpu(), w)


def test_optimal_keeps_binary_weights_exactly(device):
    low, high = torch.randn(2, 40, 1)
    w = torch.where(torch.rand(40, 64) < 0.3, low, high)
    bits = unpack_bits(ops.quantize_levels(w.to(device), "optimal", 64)[0]).cpu()
    assert torch.equal(bits, w == torch.maximum(low, high))
    torch.testing.assert_close(decoded(w.to(device), "optimal", 64).cpu(), w, rtol=0, atol=3e-7)


@pytest.mark.parametrize("rule", RULES)
def test_a_nan_does_not_stay_hidden(rule, device):
    w = torch.randn(2, 64)
    w[0, 3] = torch.nan
    result = decoded(w.to(device), rule, 64).cpu()
    assert torch.isfinite(result[1]).all()
    if rule != "minmax":  # MLX's rule skips NaN
        assert result[0].isnan().any()


def test_importance_of_zero_everywhere_counts_as_equal(device):
    w, ones = torch.randn(2, 64).to(device), torch.ones(64).to(device)
    assert torch.equal(decoded(w, "optimal", 64, ones * 0), decoded(w, "optimal", 64, ones))


def test_importance_per_value(device):
    w, importance = torch.randn(3, 128).to(device), torch.rand(3, 128).to(device)
    for row in range(3):
        alone = decoded(w[row : row + 1], "optimal", 64, importance[row])
        assert torch.equal(decoded(w, "optimal", 64, importance)[row : row + 1], alone)


@pytest.mark.parametrize("rule", RULES)
def test_gradient_goes_straight_through_and_through_the_levels(rule, isa):
    w = torch.randn(5, 128, dtype=torch.float64, requires_grad=True)
    bits = unpack_bits(ops.quantize_levels(w.detach(), rule, 64)[0])
    assert gradcheck(lambda v: binary(v, bits, rule, 64), (w,))  # the reference itself
    grad = torch.randn_like(w)
    through_levels = torch.autograd.grad(binary(w, bits, rule, 64), w, grad)[0]
    actual = torch.autograd.grad(ops.fake_quantize(w, rule, 64), w, grad)[0]
    torch.testing.assert_close(actual, grad + through_levels, rtol=1e-10, atol=1e-10)


def test_affine_takes_the_nearer_level_and_has_exact_gradients():
    w = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    scales = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)  # of either sign
    biases = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    result = ops.fake_quantize_affine(w, scales, biases, 32)
    low, high = biases.unsqueeze(-1), (biases + scales).unsqueeze(-1)
    v = groups_of(w, 32)
    bits = (v - high).abs() < (v - low).abs()
    expected = torch.where(bits, high, low).flatten(-2)
    torch.testing.assert_close(result, expected)
    grad = torch.randn_like(w)
    actual = torch.autograd.grad(result, (w, scales, biases), grad)
    wanted = torch.autograd.grad(expected, (scales, biases), grad)
    torch.testing.assert_close(actual, (grad, *wanted))


def test_rows_may_be_strided_and_empty():
    w = torch.randn(128, 6).t()
    assert torch.equal(
        ops.fake_quantize(w, "mean", 64), ops.fake_quantize(w.contiguous(), "mean", 64)
    )
    assert ops.fake_quantize(torch.empty(0, 64), "optimal", 64).shape == (0, 64)
    assert ops.quantize_levels(torch.empty(0, 64), "optimal", 64, torch.ones(64))[1].shape == (0, 1)


def test_results_do_not_depend_on_threads():
    w = torch.randn(512, 1024)
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append([*ops.quantize_levels(w, "optimal", 64), ops.fake_quantize(w, "mean", 64)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_flip_bits_flips_what_lowers_the_loss_and_says_by_how_much():
    n, k, group_size = 6, 96, 32
    x = torch.randn(500, k, dtype=torch.float64) @ torch.randn(k, k, dtype=torch.float64)
    moments = x.t() @ x / len(x) + torch.eye(k)
    w = torch.randn(n, k, dtype=torch.float64)
    packed, scales, biases = ops.quantize_levels(w, "optimal", group_size)
    bits = unpack_bits(packed)

    def decode() -> Tensor:
        groups = groups_of(bits, group_size)
        return (groups * scales.unsqueeze(-1) + biases.unsqueeze(-1)).flatten(-2)

    def loss() -> float:
        return float((((w - decode()) @ moments) * (w - decode())).sum())

    for begin, end in [(10, 50), (0, 32), (32, 96)]:  # blocks need not follow groups
        before, w_hat = loss(), decode()
        changes = ops.flip_bits_(
            bits, (w - w_hat) @ moments, scales, moments, begin, end, group_size
        )
        torch.testing.assert_close(decode()[:, begin:end] - w_hat[:, begin:end], changes)
        assert torch.equal(decode()[:, end:], w_hat[:, end:])
        assert loss() < before


# rows, columns, group size, dtype
DESCENTS = [
    (70, 96, 32, torch.float32),  # rows beyond a tile, columns beyond whole chunks of vectors
    (3, 384, 128, torch.float32),  # more blocks than one in a group
    (5, 160, 32, torch.float64),
    (0, 64, 64, torch.float32),
]


@pytest.mark.parametrize("rows, k, group_size, dtype", DESCENTS)
def test_descend_is_flip_bits_again_and_again(rows, k, group_size, dtype, device, isa):
    x = torch.randn(500, k, dtype=dtype) @ torch.randn(k, k, dtype=dtype) / k**0.5
    moments = (x.t() @ x / len(x) + 0.1 * torch.eye(k)).to(device, dtype)
    w = torch.randn(rows, k, dtype=dtype).to(device)
    packed, scales, biases = ops.quantize_levels(w, "optimal", group_size)
    bits, expected = unpack_bits(packed), unpack_bits(packed)

    def error(bits: Tensor) -> Tensor:
        groups = groups_of(bits, group_size)
        return (w - (groups * scales.unsqueeze(-1) + biases.unsqueeze(-1)).flatten(-2)) @ moments

    flips = ops.descend_(bits, error(bits), scales, moments, 3, group_size)
    counts = torch.zeros(rows, dtype=torch.int64, device=device)
    for _ in range(3):
        changes = ops.flip_bits_(expected, error(expected), scales, moments, 0, k, group_size)
        counts += changes.ne(0).sum(1)
    assert (bits != expected).sum() <= 2  # where a sum's rounding decides
    torch.testing.assert_close(flips, counts, rtol=0, atol=2)
    settled = ops.descend_(bits, error(bits), scales, moments, 1000, group_size)
    assert (settled < k * 50).all()
    assert not ops.descend_(bits, error(bits), scales, moments, 1, group_size).any()


def test_every_operator_that_writes_counts_versions(device):
    """Autograd compares versions: a tensor it saved and that has changed is refused, not used."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("onebit::")]
    # Another one needs a test as below.
    assert {s.name for s in schemas if s.is_mutable} == {
        f"onebit::{name}" for name in ("flip_bits_", "descend_", "add_products_")
    }
    bits = (torch.randn(4, 64) > 0).to(device)
    levels, error = torch.rand(4, 64).requires_grad_().to(device), torch.randn(4, 64).to(device)
    y = (levels * bits).sum()
    moments = torch.eye(64).to(device)
    ops.flip_bits_(bits, error, torch.ones(4, 2).to(device), moments, 0, 64, 32)
    ops.descend_(bits, error, torch.ones(4, 2).to(device), moments, 1, 32)
    assert bits._version == 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


OPCHECKS = {
    "quantize_levels": lambda w, s, b: (ops.quantize_levels, (w, "optimal", 32, torch.rand(64))),
    "fake_quantize": lambda w, s, b: (ops.fake_quantize, (w.requires_grad_(), "mean", 32)),
    "fake_quantize_backward": lambda w, s, b: (ops.fake_quantize_backward, (w, w, "sign", 32)),
    "fake_quantize_affine": lambda w, s, b: (
        ops.fake_quantize_affine,
        (w.requires_grad_(), s.requires_grad_(), b.requires_grad_(), 32),
    ),
    "fake_quantize_affine_backward": lambda w, s, b: (
        ops.fake_quantize_affine_backward,
        (w, w, s, b, 32),
    ),
    "flip_bits_": lambda w, s, b: (ops.flip_bits_, (w > 0, w, s, torch.rand(64, 64), 0, 32, 32)),
    "descend_": lambda w, s, b: (ops.descend_, (w > 0, w, s, torch.rand(64, 64), 2, 32)),
}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    op, args = OPCHECKS[name](torch.randn(4, 64), torch.rand(4, 2), torch.randn(4, 2))
    # Straight through is not the derivative of a step: numeric checks of the gradient are above.
    opcheck(op.default, args)


def composite(op, *args):
    """What op would run for tensors on a device without kernels."""
    return op.default.redispatch(DispatchKeySet(DispatchKey.XPU), *args)


@pytest.mark.parametrize("rule, group_size, dtype", CASES)
def test_composite_equals_the_kernels(rule, group_size, dtype):
    w, grad = torch.randn(2, 9, 256, dtype=dtype)
    importance = torch.rand(256) if rule in ("sign", "optimal") else None
    for op, args in [
        (ops.quantize_levels, (w, rule, group_size, importance)),
        (ops.fake_quantize, (w, rule, group_size)),
        (ops.fake_quantize_backward, (grad, w, rule, group_size)),
    ]:
        torch.testing.assert_close(composite(op, *args), op(*args))


def test_composite_affine_and_flips_equal_the_kernels():
    w, grad, error = torch.randn(3, 4, 64)
    scales, biases = torch.randn(2, 4, 2)
    for op, args in [
        (ops.fake_quantize_affine, (w, scales, biases, 32)),
        (ops.fake_quantize_affine_backward, (grad, w, scales, biases, 32)),
        (ops.flip_bits_, (w > 0, error * 5, scales, torch.rand(64, 64) + 1, 8, 40, 32)),
        (ops.descend_, (w > 0, error * 5, scales, torch.rand(64, 64) + 60 * torch.eye(64), 3, 32)),
    ]:
        mine, theirs = ([a.clone() if isinstance(a, Tensor) else a for a in args] for _ in "ab")
        torch.testing.assert_close(composite(op, *mine), op(*theirs))
        torch.testing.assert_close(mine[0], theirs[0])  # bits are flipped in place


W, LEVELS, BITS = torch.randn(4, 64), torch.rand(4, 2), torch.rand(4, 64) > 0.5
SQUARE = torch.rand(64, 64)
ERRORS = [
    (ops.quantize_levels, (W, "median", 32), "rule must be .* got median"),
    (ops.quantize_levels, (W, "mean", 48), "group_size must be 32, 64 or 128, got 48"),
    (ops.quantize_levels, (W.int(), "mean", 32), "w must be float32, .* got Int"),
    (ops.quantize_levels, (W[:, :48], "mean", 32), "w must have a last .* 32, got 48"),
    (ops.quantize_levels, (W, "mean", 32, W[0]), "rule must be sign or optimal .* got mean"),
    (ops.quantize_levels, (W, "sign", 32, W[0, :32]), r"importance must .* got \[32\]"),
    (ops.quantize_levels, (W, "sign", 32, W[:2]), r"importance must .* got \[2, 64\]"),
    (ops.quantize_levels, (W, "sign", 32, W[0].int()), "importance must be float32.* got Int"),
    (ops.fake_quantize, (W, "mode", 32), "rule must be .* got mode"),
    (ops.fake_quantize_backward, (W[:2], W, "mean", 32), r"grad must .* got \[2, 64\]"),
    (ops.fake_quantize_affine, (W, LEVELS[:, :1], LEVELS, 32), r"scales must .* got \[4, 1\]"),
    (ops.fake_quantize_affine, (W, LEVELS, LEVELS.half(), 32), "biases must .* got Half"),
    (ops.flip_bits_, (W, W, LEVELS, SQUARE, 0, 32, 32), "bits must be bool, got Float"),
    (ops.flip_bits_, (BITS, W, LEVELS, SQUARE, 0, 65, 32), "begin and end must .* got 0 and 65"),
    (ops.flip_bits_, (BITS, W, LEVELS, W, 0, 32, 32), r"moments must .* got \[4, 64\]"),
    (ops.flip_bits_, (BITS, W, LEVELS.half(), SQUARE, 0, 32, 32), "scales must .* got Half"),
    (ops.flip_bits_, (BITS.t(), W, LEVELS, SQUARE, 0, 4, 32), "bits must be contiguous"),
    (ops.descend_, (BITS, W, LEVELS, SQUARE, 0, 32), "sweeps must be at least 1, got 0"),
    (ops.descend_, (BITS, W, LEVELS, W, 1, 32), r"moments must .* got \[4, 64\]"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op, args, message", ERRORS, ids=[e[2] for e in ERRORS])
def test_illegal_arguments(op, args, message, device):
    args = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    with pytest.raises(ValueError, match=message):
        op(*args)
    if device == "cpu":
        with pytest.raises(ValueError, match=message):
            composite(op, *args)


def test_illegal_output_type():
    with pytest.raises(ValueError, match=r"dtype must be float32, .* got Int"):
        ops.fake_quantize(W, "mean", 32, dtype=torch.int32)
