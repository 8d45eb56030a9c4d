"""The accuracy rule where errors do not average out. ``make fuzz-accuracy`` searches for more."""

import pytest
import torch
from helpers import relative_error, to_numpy
from structured import BITS, Case, X, errors, is_prepackable, pack

from torch_onebit import ops

HALF, BRAIN = torch.float16, torch.bfloat16

# Every row failed once, or is the hardest of its kind that a search found.
CASES = [
    (Case("ones", "any", "random", BRAIN, m=8), "a common rounding of x must cancel"),
    (Case("ones", "any", "random", HALF, group=32, m=8), "the same in float16"),
    (Case("0 or 1", "any", "random", HALF, group=32), "two values"),
    (Case("0 or 1", "symmetric", "random", BRAIN), "two values, both levels of a size"),
    (Case("near 1", "symmetric", "random", BRAIN, BRAIN), "a mean that cancels"),
    (Case("0.3", "symmetric", "random", m=128, groups=32), "sums of float32 that cancel"),
    (Case("0.3", "s = 2d, b = -d", "random", m=1, groups=1), "one group, one row"),
    (Case("relu", "any", "random", groups=32), "half of x is 0"),
    (Case("positive", "high is 0", "one clear"), "all but one value meet a level of 0"),
    (Case("positive", "low is 0", "one set"), "the same, the other level"),
    (Case("positive", "high is 0", "all set"), "every value meets a level of 0"),
    (Case("alternating", "one sign", "all clear"), "x cancels to 0"),
    (Case("outliers of 10000.0", "low is 0", "random, clear at outliers"), "outliers meet 0"),
    (Case("outliers of 10000.0", "high is 0", "random, set at outliers", BRAIN), "in bfloat16"),
    (
        Case("outliers of 10000.0", "high is 0", "random, set at outliers", HALF, group=32),
        "float16",
    ),
    (Case("outliers of 256.0", "low is 0", "random, clear at outliers", BRAIN, m=1), "nearly fits"),
    (
        Case("outliers of 128.0", "high is 0", "random, set at outliers", m=1),
        "nearly fits, float32",
    ),
    (
        Case("outliers among ones", "high is 0", "random, set at outliers", BRAIN),
        "outliers in ones",
    ),
    (Case("over many magnitudes", "low is 0", "one set", BRAIN), "too wide for one step"),
    (Case("sharp softmax", "low is 0", "one set elsewhere", BRAIN, group=64), "a few large values"),
    (Case("sorted", "high is near 0", "one clear", HALF, HALF, group=32, m=8), "like values"),
    (
        Case("sorted", "high is near 0", "one clear", HALF, HALF, 32, 8, 300, 2, 44),
        "one small value of a group",
    ),
    (Case("trained", "symmetric", "random", BRAIN), "activations of a trained network"),
    (
        Case("sorted", "symmetric", "one set", group=32, m=8, groups=40),
        "groups of one sign cancel, float32",
    ),
    (
        Case("sharp softmax", "any", "random", m=2, n=32, groups=512),
        "large values, then many groups",
    ),
    (Case("ones", "any", "random", n=256, transpose=False), "sums over rows of weights"),
    (
        Case("outliers of 10000.0", "high is 0", "all set", n=256, transpose=False),
        "outliers meet 0",
    ),
    (
        Case("alternating", "low is 0", "one set", m=33, n=128, groups=2, transpose=False),
        "neighbours cancel",
    ),
    (
        Case("alternating", "one sign", "all clear", group=64, n=128, groups=2, transpose=False),
        "neighbours cancel, columns alike",
    ),
    (
        Case("over many magnitudes", "high is near 0", "one set", group=32, m=9, transpose=False),
        "small levels",
    ),
    (
        Case("sharp softmax", "low is 0", "random", m=2, n=128, transpose=False),
        "values too far apart for integers",
    ),
]


@pytest.mark.parametrize("case, why", CASES, ids=[why for _, why in CASES])
def test_rule_holds_for_structured_products(case, why, isa):
    error, plain, allowed = errors(case)
    assert error <= allowed, f"torch {plain}"


@pytest.mark.skipif(not torch.ops.onebit.can_prepack(), reason="no prepacked form on this machine")
@pytest.mark.parametrize("case, why", CASES, ids=[why for _, why in CASES])
def test_rule_holds_for_prepacked_weights(case, why):
    if is_prepackable(case):
        error, plain, allowed = errors(case, prepacked=True)
        assert error <= allowed, f"torch {plain}"


@pytest.mark.parametrize("dtype, small", [(BRAIN, 2.0**-12), (torch.float32, 2.0**-30)])
def test_a_value_below_the_step_of_its_group_counts_where_the_others_meet_0(dtype, small, isa):
    n, group, position = 128, 128, 5
    x = torch.ones(1, group, dtype=dtype)
    x[:, position] = small
    scales = 0.01 + 0.02 * torch.rand(n, 1)
    packed = pack(BITS["one set"](n, group, group, position))
    y = ops.qmm(x, packed, scales, torch.zeros(n, 1), group_size=group)
    assert relative_error(y, to_numpy(small * scales.T.double())) <= torch.finfo(dtype).eps


# Activations, gradient of the product, bits.
GRADIENTS = [
    ("ones", "near 1", "random", "common roundings"),
    ("sorted", "outliers among positives", "all set", "sums that cancel, rows that do not"),
    ("alternating", "sorted", "one clear elsewhere", "both cancel"),
    ("outliers of 16.0", "random", "random, clear at outliers", "outliers the bits leave out"),
    ("relu", "alternating", "random, clear at outliers", "sums of groups all positive"),
    ("a constant", "outliers among positives", "one clear elsewhere", "roundings all alike"),
]


@pytest.mark.parametrize("dtype", [torch.float32, HALF, BRAIN])
@pytest.mark.parametrize("x, grad, bits, why", GRADIENTS, ids=[row[-1] for row in GRADIENTS])
def test_rule_holds_for_gradients_of_levels(x, grad, bits, why, dtype, isa):
    m, n, k, group = 33, 96, 256, 64
    x, grad = X[x](m, k, group, 5).to(dtype), X[grad](m, n, group, 5).to(dtype)
    bits = BITS[bits](n, k, group, 5)
    levels = torch.rand(2, n, k // group).to(dtype).requires_grad_()
    scales, biases = levels.repeat_interleave(group, -1)
    (x @ (scales * bits + biases).T).backward(grad)
    dw = (grad.double().T @ x.double()).view(n, -1, group)
    expected = (dw * bits.view_as(dw)).sum(-1), dw.sum(-1)
    got = ops.affine_grad(grad, x, pack(bits), group_size=group)
    for ours, theirs, exact in zip(got, levels.grad, expected, strict=True):
        error = relative_error(ours.to(dtype), to_numpy(exact))
        plain = relative_error(theirs, to_numpy(exact))
        assert error <= 2 * max(plain, torch.finfo(dtype).eps / 2), why
