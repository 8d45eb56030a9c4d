"""Products that read the same x: one call of them, and how compiled models come to it."""

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils.flop_counter import FlopCounterMode

import torch_onebit
from torch_onebit import OneBitLinear, ops

each = torch.ops.onebit.qmm_prepacked_each
COLUMNS, FORM = 256, (256, 64, torch.bfloat16, True)


def prepacked(n: int) -> torch.Tensor:
    packed, scales, _ = torch_onebit.quantize(torch.randn(n, COLUMNS), 64)
    return ops.prepack(packed, scales.bfloat16(), None, 64)


# rows of each matrix, shape of x, its dtype, and why
CASES = [
    ([2048, 1024, 1024], (1, 1), torch.bfloat16, "q, k and v of a token"),
    ([70, 1, 300], (2,), torch.float32, "incomplete tiles"),
    ([64, 128], (40,), torch.bfloat16, "fewer tiles than rows of x"),
    ([200, 0, 64], (3,), torch.bfloat16, "no outputs among others"),
    ([3, 640], (2,), torch.float32, "one for the scalar kernel"),
    ([64, 64, 3], (2,), torch.float64, "no kernel"),
    ([64, 64], (0,), torch.float32, "no rows"),
    ([64, 70], (), torch.float32, "a vector"),
]


@pytest.mark.filterwarnings("ignore:torch_onebit has no kernel of qmm_prepacked")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[-1])
def test_joined_products_are_the_single_ones_to_the_bit(case, isa):
    rows, lead, dtype, _ = case
    x, weights = torch.randn(*lead, COLUMNS).to(dtype), [prepacked(n) for n in rows]
    joined = each(x, weights, rows, *FORM)
    single = [ops.qmm_prepacked(x, w, n, *FORM) for w, n in zip(weights, rows, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(joined[: len(rows)], single, strict=True))
    assert all(t.shape == (0,) for t in joined[len(rows) :])


def test_joined_products_do_not_depend_on_the_number_of_threads():
    """With more threads than tiles of outputs, rows of x are split too."""
    x, weights, rows = torch.randn(300, COLUMNS), [prepacked(100), prepacked(30)], [100, 30]
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        results.append(torch.cat(each(x, weights, rows, *FORM)[:2], -1))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_x_need_not_be_contiguous():
    weights = [prepacked(64), prepacked(128)]
    x = torch.randn(COLUMNS, 5).T
    joined = each(x, weights, [64, 128], *FORM)
    expected = each(x.contiguous(), weights, [64, 128], *FORM)
    assert all(map(torch.equal, joined, expected))


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient):
    x = torch.randn(3, COLUMNS, requires_grad=gradient)
    torch.library.opcheck(each.default, (x, [prepacked(64), prepacked(70)], [64, 70], *FORM))


def test_gradients_autocast_and_vmap_are_those_of_single_products():
    x, weights = torch.randn(4, COLUMNS), [prepacked(64), prepacked(70)]
    joined = lambda x: torch.cat(each(x, weights, [64, 70], *FORM)[:2], -1)
    single = lambda x: torch.cat(
        [ops.qmm_prepacked(x, w, n, *FORM) for w, n in zip(weights, (64, 70), strict=True)], -1
    )
    for transform in (
        lambda f: f(x),
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.func.jvp(f, (x,), (x + 1,))[1],
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.autocast("cpu", torch.bfloat16)(f)(x),
    ):
        torch.testing.assert_close(transform(joined), transform(single))


def test_flops_are_those_of_single_products():
    with FlopCounterMode(display=False) as count:
        each(torch.randn(5, COLUMNS), [prepacked(64), prepacked(70)], [64, 70], *FORM)
    assert count.get_total_flops() == 2 * 5 * COLUMNS * (64 + 70)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "rows, columns, spoil, message",
    [
        ([64], COLUMNS, None, "rows must be one number for each of the 2 prepacked weights, got 1"),
        ([64, -1], COLUMNS, None, "rows must be at least 0, got -1"),
        ([64, 70], 320, None, "x must have a last dimension of 320 .*, got 256"),
        ([64, 70], COLUMNS, lambda w: w.int(), "prepacked must be a contiguous uint8 vector"),
    ],
)
def test_what_is_refused(rows, columns, spoil, message, device):
    weights = [prepacked(64), (spoil or torch.clone)(prepacked(70))]
    x, weights = torch.randn(2, COLUMNS, device=device), [w.to(device) for w in weights]
    with pytest.raises(ValueError, match=message):
        each(x, weights, rows, columns, *FORM[1:])


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_weight_and_four_are_refused(count, device):
    x, weights = torch.randn(2, COLUMNS, device=device), [prepacked(64).to(device)] * count
    with pytest.raises(ValueError, match=f"prepacked must be 2 or 3 .*, got {count}"):
        each(x, weights, [64] * count, *FORM)


def test_bytes_of_something_else_are_refused():
    with pytest.raises(ValueError, match="prepacked must be what prepack of this version made of"):
        each(torch.randn(2, COLUMNS), [prepacked(64), prepacked(70)], [64, 64], *FORM)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options = {"bias": False, "group_size": 64, "dtype": torch.bfloat16}
        self.q, self.k, self.v = (OneBitLinear(COLUMNS, n, **options) for n in (128, 70, 5))
        self.fourth = OneBitLinear(COLUMNS, 64, **options)
        self.o = OneBitLinear(128, COLUMNS, **options)
        self.gate = OneBitLinear(COLUMNS, 64, **options | {"bias": True})
        self.up = OneBitLinear(COLUMNS, 64, **options)
        self.other = OneBitLinear(COLUMNS, 64, **options | {"group_size": 128})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sums = [layer(x).sum(-1, keepdim=True) for layer in (self.k, self.v, self.fourth)]
        x = self.o(self.q(x)) + sum(sums)
        return self.gate(x) * self.up(x) + self.other(x)


@pytest.mark.skipif(not ops.can_prepack(), reason="no kernels of prepacked weights")
def test_compiled_models_join_products_of_one_x():
    model = torch_onebit.prepack_(Block())
    options = torch_onebit.compile_options()
    compiled = torch.compile(model, fullgraph=True, options=options)
    for rows in (1, 6):
        x = torch.randn(rows, COLUMNS).bfloat16()
        with torch.no_grad():
            y, code = run_and_get_code(compiled, x)
            torch._dynamo.reset()
            torch.testing.assert_close(y, torch.compile(model)(x), rtol=0, atol=0)
        calls = [
            code[0].count(f"onebit.{op}.default(") for op in ("qmm_prepacked_each", "qmm_prepacked")
        ]
        assert calls == [2, 3]  # q, k and v, gate and up; the fourth, o and other


@pytest.mark.skipif(not ops.can_prepack(), reason="no kernels of prepacked weights")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="lists of tensors are passed by Python")
def test_a_wrapper_in_cpp_calls_the_kernels_without_python():
    model, x = torch_onebit.prepack_(Block()), torch.randn(1, COLUMNS).bfloat16()
    options = torch_onebit.compile_options() | {"cpp_wrapper": True, "max_autotune": True}
    with torch.no_grad():
        y, code = run_and_get_code(torch.compile(model, fullgraph=True, options=options), x)
        torch._dynamo.reset()
        torch.testing.assert_close(y, torch.compile(model)(x), rtol=0, atol=0)
    assert '"onebit::qmm_prepacked_each"' in code[0] and '"onebit::qmm_prepacked"' in code[0]
    assert "PyObject_CallObject" not in code[0]


@pytest.mark.skipif(not ops.can_prepack(), reason="no kernels of prepacked weights")
def test_joined_products_train_what_reads_them():
    model = torch_onebit.prepack_(Block())
    grads = []
    for options in (None, torch_onebit.compile_options()):
        torch._dynamo.reset()
        x = torch.ones(2, COLUMNS).bfloat16().requires_grad_()
        torch.compile(model, options=options)(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
