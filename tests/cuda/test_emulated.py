"""The shipped .cu files run here without a GPU, launched as planned, on an emulated one."""

from dataclasses import dataclass

import emulated_calls as gpu
import emulator
import plans
import pytest
import reference
import torch
from helpers import assert_as_accurate_as_torch, make_weights, to_numpy, torch_qmm

from torch_onebit.ops import RULES

ops = torch.ops.onebit
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
A100, RTX = (80, 108), (120, 100)
ORDERS = {"forward": emulator.FORWARD, "reverse": emulator.REVERSE, "random": emulator.RANDOM}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@dataclass
class Product:
    why: str
    way: str
    m: int
    n: int
    k: int
    x: torch.dtype = BFLOAT
    levels: torch.dtype | None = None
    group_size: int = 128
    symmetric: bool = False
    gpu: tuple[int, int] = plans.H100
    order: str = "forward"
    splits: int = 1
    outlier: float | None = None

    def arguments(self):
        packed, scales, biases = make_weights(
            self.n,
            self.k,
            group_size=self.group_size,
            dtype=self.levels or self.x,
            symmetric=self.symmetric,
        )
        x = torch.randn(self.m, self.k)
        if self.outlier is not None:  # which the weights do not see
            x[:, 0], packed[:, 0], biases = self.outlier, packed[:, 0] & ~1, biases * 0
        return x.to(self.x), packed, scales, biases, self.group_size

    def run(self, arguments, **options) -> torch.Tensor:
        launches = gpu.Options(schedule=ORDERS[self.order], **options)
        return gpu.product(*arguments, gpu=self.gpu, run=launches)


PRODUCTS = [
    Product("one row", "b1", 1, 40, 512),
    Product("as many rows as planes take, symmetric", "b1", 4, 17, 1024, HALF, symmetric=True),
    Product("planes of two groups", "b1", 2, 16, 512, HALF, FLOAT, 64),
    Product("planes of four groups", "b1", 2, 24, 512, BFLOAT, group_size=32, order="random"),
    Product("32 planes", "b1", 3, 20, 512, FLOAT, group_size=64),
    Product("32 planes of four groups", "b1", 2, 8, 512, FLOAT, HALF, 32, order="reverse"),
    Product("blocks that fixed point does not hold", "b1", 2, 20, 1024, outlier=2.0**14),
    Product("the same in float32", "b1", 2, 20, 512, FLOAT, outlier=2.0**30),
    Product("8 rows, whole groups of four", "hmma", 8, 40, 512, order="random"),
    Product("rows and groups with a rest", "hmma", 13, 40, 448, HALF, FLOAT, 64, gpu=A100),
    Product("groups of 32, with a rest", "hmma", 5, 24, 480, BFLOAT, group_size=32, gpu=RTX),
    Product("symmetric groups of 32", "hmma", 7, 16, 256, HALF, None, 32, symmetric=True),
    Product("two tiles of outputs", "hmma", 9, 70, 512, BFLOAT, group_size=64, gpu=(80, 1)),
    Product("three parts", "hmma", 5, 24, 512, FLOAT, gpu=A100),
    Product("three parts, groups of 64 with a rest", "hmma", 5, 24, 320, FLOAT, HALF, 64),
    Product("three parts, symmetric", "hmma", 5, 16, 256, FLOAT, None, 32, True, A100, "reverse"),
    Product("tiles of 32 rows", "tiles", 20, 140, 640, gpu=A100, order="random"),
    Product("tiles of 64, groups of 32", "tiles", 50, 130, 384, HALF, FLOAT, 32, gpu=RTX),
    Product("tiles of 128, symmetric", "tiles", 70, 64, 256, HALF, None, 64, True, gpu=A100),
    Product("a split of k", "tiles", 17, 40, 2048, gpu=A100, splits=2),
    Product("one step a stage", "wgmma", 20, 140, 640, HALF, FLOAT, order="random"),
    Product("four steps a stage", "wgmma", 33, 130, 1024, BFLOAT, group_size=64, order="reverse"),
    Product("groups of 32, symmetric", "wgmma", 40, 64, 512, HALF, None, 32, True, order="random"),
    Product("as many stages as wait for each other", "wgmma", 20, 64, 1920, order="random"),
    Product("tiles of 128 rows", "wgmma", 70, 64, 256),
    Product("tiles of 256 rows", "wgmma", 130, 64, 256, gpu=(90, 1)),
    Product("a split of k, outputs with a rest", "wgmma", 9, 45, 2048, HALF, splits=2),
    Product("three parts", "wgmma", 5, 130, 384, FLOAT, order="random"),
    Product("three parts, groups of 32", "wgmma", 40, 33, 256, FLOAT, HALF, 32),
]


@pytest.mark.parametrize("case", PRODUCTS, ids=[f"{c.way}: {c.why}" for c in PRODUCTS])
def test_products_are_as_accurate_as_torch(case):
    plan = plans.product(
        case.m, case.n, case.k, gpu=case.gpu, group_size=case.group_size, x=gpu.NAMES[case.x],
        levels=gpu.NAMES[case.levels or case.x], biases=not case.symmetric,
    )  # fmt: skip
    assert (plan.way, plan.splits) == (case.way, case.splits)
    x, packed, scales, biases, group_size = arguments = case.arguments()
    exact = reference.qmm(*map(to_numpy, (x, packed, scales, biases)), group_size, True)
    y = case.run(arguments)
    assert_as_accurate_as_torch(y, torch_qmm(*arguments), exact)


@pytest.mark.parametrize("way, m", [("b1", 3), ("hmma", 8), ("wgmma", 20)])
def test_infinity_and_nan_spoil_their_row_alone(way, m):
    x = torch.zeros(m, 512, dtype=BFLOAT)
    x[0, 5], x[1, 7] = float("inf"), float("nan")
    y = gpu.product(x, *make_weights(33, 512, dtype=BFLOAT), 128)
    assert not torch.isfinite(y[:2]).any()
    assert torch.equal(y[2:], torch.zeros_like(y[2:]))


@pytest.mark.parametrize(
    "transpose, x, levels, group_size, symmetric",
    [(True, HALF, FLOAT, 64, False), (True, FLOAT, FLOAT, 32, True),
     (False, BFLOAT, BFLOAT, 32, False), (False, FLOAT, HALF, 64, True)],
)  # fmt: skip
def test_chosen_matrices(transpose, x, levels, group_size, symmetric):
    columns = 128 if transpose else 48
    experts = make_weights(3, 48, 128, group_size=group_size, dtype=levels, symmetric=symmetric)
    values = torch.randn(2, 3, columns).to(x)
    lhs, rhs = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 0, 3, -1])  # the last two are no matrix
    y = gpu.gathered(values, *experts, lhs, rhs, group_size, transpose)
    assert y[2:].isnan().all()
    for b in range(2):
        w = [None if t is None else t[rhs[b]] for t in experts]
        exact = reference.qmm(*map(to_numpy, (values[lhs[b]], *w)), group_size, transpose)
        plain = torch_qmm(values[lhs[b]], *w, group_size, transpose)
        assert_as_accurate_as_torch(y[b], plain, exact)


def same(actual, expected) -> bool:
    """Bit for bit, NaN of any form."""
    pairs = zip(actual, expected, strict=True)
    return all(a.dtype == e.dtype and torch.equal(a.nan_to_num(7.5), e.nan_to_num(7.5))
               and torch.equal(a.signbit() & ~a.isnan(), e.signbit() & ~e.isnan())
               for a, e in pairs)  # fmt: skip


def hard_weights(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    w = torch.randn(rows, columns).to(dtype)
    w[0], w[1, :40] = 3.0, 0.0
    w[2] = w[2].abs()
    w[2, 3], w[2, 7] = -0.0, 0.0  # the first zero is the least
    w[3, 9] = float("nan")
    return w


@pytest.mark.parametrize("dtype, group_size", [(FLOAT, 128), (HALF, 64), (BFLOAT, 32)])
def test_quantize_is_the_cpus(dtype, group_size):
    w = hard_weights(11, 384, dtype)  # no infinity: the NaN of inf - inf has a sign on x86 alone
    assert same(gpu.quantize(w, group_size), ops.quantize(w, group_size))


@pytest.mark.parametrize(
    "levels, out, group_size, symmetric",
    [(BFLOAT, BFLOAT, 128, False), (HALF, HALF, 32, True), (FLOAT, HALF, 64, False)],
)
def test_decoding_is_the_cpus(levels, out, group_size, symmetric):
    coded = make_weights(7, 384, group_size=group_size, dtype=levels, symmetric=symmetric)
    y = gpu.decode(*coded, group_size, dtype=out)
    assert same([y], [ops.dequantize(*coded, group_size).to(out)])
    rows = torch.tensor([6, 0, 3])
    y = gpu.decode(*coded, group_size, torch.tensor([6, 0, 3, 7, -1]), dtype=out)
    assert same([y[:3]], [ops.embedding(rows, *coded, group_size).to(out)])
    assert y[3:].isnan().all()


@pytest.mark.parametrize(
    "dtype, group_size, transpose", [(FLOAT, 32, True), (HALF, 64, False), (BFLOAT, 128, True)]
)
def test_gradients_of_levels(dtype, group_size, transpose):
    packed, _, _ = make_weights(21, 256, group_size=group_size)
    by_row, by_column = torch.randn(5, 21).to(dtype), torch.randn(5, 256).to(dtype)
    grad, x = (by_row, by_column) if transpose else (by_column, by_row)
    found = gpu.affine_grad(grad, x, packed, group_size, transpose)
    exact = ops.affine_grad(grad.double(), x.double(), packed, None, None, group_size, transpose)
    for a, e in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


# rule, dtype of w, the other dtype, group size, with importance
LEVELS = [
    ("minmax", FLOAT, BFLOAT, 128, False),
    ("sign", BFLOAT, BFLOAT, 32, True),
    ("mean", HALF, FLOAT, 64, False),
    ("optimal", FLOAT, FLOAT, 64, False),
    ("optimal", BFLOAT, HALF, 128, True),
]


@pytest.mark.parametrize("rule, dtype, other, group_size, weighted", LEVELS)
def test_levels_are_the_cpus(rule, dtype, other, group_size, weighted):
    w = hard_weights(9, 256, dtype).nan_to_num(0.5)  # groups with a rest of a block
    importance = torch.rand(256) ** 4 if weighted else None
    groups = (9, 256 // group_size)
    coded = [
        torch.empty(9, 8, dtype=torch.int32),
        torch.empty(groups, dtype=dtype),
        torch.empty(groups, dtype=dtype),
    ]
    outputs = dict(zip(("packed", "first", "second"), coded, strict=True))
    gpu.on_groups("quantize_levels", w, group_size, outputs, rule=rule, importance=importance)
    assert same(coded, ops.quantize_levels(w, rule, group_size, importance))


@pytest.mark.parametrize("rule", RULES)
def test_training_through_a_rule_is_the_cpus(rule):
    w, grad = torch.randn(2, 5, 256)
    w[0, :64] = 1.0  # equal weights
    w, grad = w.to(BFLOAT), grad.to(HALF)
    fake = torch.empty(5, 256, dtype=HALF)
    gpu.on_groups("fake_quantize", w, 64, {"out": fake}, rule=rule, other=HALF)
    assert same([fake], [ops.fake_quantize(w.float(), rule, 64).to(HALF)])
    grad_w = torch.empty_like(w)
    gpu.on_groups(
        "fake_quantize_backward", w, 64, {"out": grad_w}, rule=rule, grad=grad, other=HALF
    )
    expected = ops.fake_quantize_backward(grad.float(), w.float(), rule, 64)
    torch.testing.assert_close(grad_w, expected.to(BFLOAT), rtol=2**-8, atol=1e-6)


def test_training_of_free_levels_is_the_cpus():
    w, grad = torch.randn(2, 5, 256)
    scales, biases = torch.randn(2, 5, 8)  # a negative scale swaps the levels
    levels = (scales, biases)
    fake = torch.empty_like(w)
    gpu.on_groups("fake_quantize_affine", w, 32, {"out": fake}, levels=levels)
    assert same([fake], [ops.fake_quantize_affine(w, *levels, 32)])
    found = [torch.empty_like(t) for t in levels]
    outputs = dict(zip(("first", "second"), found, strict=True))
    gpu.on_groups("fake_quantize_affine_backward", w, 32, outputs, levels=levels, grad=grad)
    assert same(found, ops.fake_quantize_affine_backward(grad, w, *levels, 32))


def test_flipping_bits_is_the_cpus():
    bits, error = torch.rand(6, 128) > 0.5, torch.randn(6, 128) * 20
    scales, half = torch.rand(6, 2), torch.randn(128, 128)
    moments, block = half @ half.T, (32, 104)
    arguments = (scales, moments, *block, 64)
    flipped = bits.clone()
    changes, left = gpu.flip_bits(flipped, error, *arguments)
    expected = ops.flip_bits_(bits, error.clone(), *arguments)
    assert torch.equal(flipped, bits) and (changes != 0).any()
    assert same([changes], [expected])
    here = slice(*block)
    follows = error[:, here].double() - changes.double() @ moments[here, here].double()
    torch.testing.assert_close(left.double(), follows, rtol=1e-4, atol=1e-3)
