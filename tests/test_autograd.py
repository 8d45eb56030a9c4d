"""Gradients: gradcheck in float64, twice; opcheck on every operator; what has no gradient says
so."""

import pytest
import torch
from helpers import make_weights
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from torch_onebit import quantize_, thaw_levels_

ops = torch.ops.onebit


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def weights(*sizes: int, symmetric: bool = False) -> list[Tensor | None]:
    packed, scales, biases = make_weights(
        *sizes, group_size=32, dtype=torch.float64, symmetric=symmetric
    )
    return [packed, scales.requires_grad_(), None if biases is None else biases.requires_grad_()]


def index(*values: int) -> Tensor:
    return torch.tensor(values)


def calls() -> dict[str, tuple]:
    """name: (operator, arguments); every way a gradient is routed."""
    return {
        "qmm": (ops.qmm, (double(3, 64), *weights(4, 64), 32)),
        "qmm symmetric": (ops.qmm, (double(3, 64), *weights(4, 64, symmetric=True), 32)),
        "qmm transpose=False": (ops.qmm, (double(3, 5), *weights(5, 32), 32, False)),
        "qmm vector": (ops.qmm, (double(64), *weights(4, 64), 32)),
        "qmm vector, stack": (ops.qmm, (double(32), *weights(2, 3, 32), 32)),
        "qmm batch broadcast": (ops.qmm, (double(1, 2, 3, 32), *weights(2, 1, 4, 32), 32)),
        "gather_qmm": (
            ops.gather_qmm,
            (double(3, 1, 32), *weights(4, 5, 32), index(0, 0, 1, 2), index(3, 1, 1, 0), 32),
        ),
        "gather_qmm rhs only, symmetric": (
            ops.gather_qmm,
            (double(3, 2, 32), *weights(4, 5, 32, symmetric=True), None, index(3, 3, 0), 32),
        ),
        "gather_qmm lhs only, transpose=False": (
            ops.gather_qmm,
            (double(4, 2, 5), *weights(2, 5, 32), index(3, 3), None, 32, False),
        ),
        "gather_qmm broadcast indices": (
            ops.gather_qmm,
            (double(2, 1, 32), *weights(3, 4, 32), index(0, 1)[:, None], index(2, 2, 0), 32),
        ),
        "gather_qmm x without stack": (
            ops.gather_qmm,
            (double(2, 32), *weights(3, 4, 32), None, index(2, 0), 32),
        ),
        "dequantize": (ops.dequantize, (*weights(3, 64), 32)),
        "dequantize symmetric": (ops.dequantize, (*weights(2, 3, 64, symmetric=True), 32)),
        "embedding": (ops.embedding, (index(1, 1, 0).view(1, 3), *weights(4, 64), 32)),
        "embedding symmetric": (ops.embedding, (index(2), *weights(4, 64, symmetric=True), 32)),
        "affine_grad": (
            ops.affine_grad,
            (double(3, 4), double(3, 64), weights(4, 64)[0], None, None, 32),
        ),
        "affine_grad gather": (
            ops.affine_grad,
            (
                double(3, 2, 4),
                double(2, 2, 32),
                weights(2, 4, 32)[0],
                index(1, 1, 0),
                index(1, 1, 0),
                32,
            ),
        ),
    }


NAMES = list(calls())


def split(arguments: tuple):
    """The differentiable arguments, and a function of them alone."""
    places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]

    def bind(op):
        def function(*inputs: Tensor):
            full = list(arguments)
            for place, value in zip(places, inputs, strict=True):
                full[place] = value
            return op(*full)

        return function

    return bind, [arguments[i] for i in places]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_exact(name, isa):
    op, arguments = calls()[name]
    bind, inputs = split(arguments)
    assert gradcheck(bind(op), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_exact(name):
    op, arguments = calls()[name]
    bind, inputs = split(arguments)
    assert gradcheck(
        bind(op), inputs, check_forward_ad=True, check_backward_ad=False, fast_mode=True
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_gradients_are_exact(name):
    op, arguments = calls()[name]
    bind, inputs = split(arguments)
    # Fast: along random directions. The whole Jacobian of gather_qmm takes a minute.
    assert gradgradcheck(bind(op), inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", [*NAMES, "quantize"])
def test_opcheck(name):
    op, arguments = calls()[name] if name != "quantize" else (ops.quantize, (double(3, 64), 32))
    opcheck(op.default, arguments)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_have_the_dtype_of_their_input(x_dtype, dtype, isa):
    packed, scales, biases = make_weights(70, 256, dtype=dtype)
    x = torch.randn(5, 256).to(x_dtype).requires_grad_()
    inputs = [x, scales.requires_grad_(), biases.requires_grad_()]
    y = ops.qmm(x, packed, scales, biases, 128)
    grad = torch.randn(y.shape).to(y.dtype)
    actual = torch.autograd.grad(y, inputs, grad)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    plain = torch.matmul(exact[0], ops.dequantize(packed, *exact[1:], 128).T)
    for got, wanted, source in zip(
        actual, torch.autograd.grad(plain, exact, grad.double()), inputs, strict=True
    ):
        assert got.dtype == source.dtype
        unit = torch.finfo(source.dtype).eps
        assert (got.double() - wanted).norm() <= 2 * unit * wanted.norm() + 1e-6 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gathered_gradients_are_summed_in_float32(dtype, device):
    """One matrix of x, gathered 4096 times: a sum in bfloat16 would stop growing at 256."""
    packed = torch.full((1, 32, 1), -1, dtype=torch.int32, device=device)  # all bits 1
    scales = torch.full((1, 32, 1), 2 / 32, dtype=dtype, device=device)
    x = torch.ones(1, 1, 32, dtype=dtype, device=device, requires_grad=True)
    lhs = torch.zeros(4096, dtype=torch.int64, device=device)
    ops.gather_qmm(x, packed, scales, None, lhs, None, 32).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 4096))


def test_gradients_of_nothing_are_nothing():
    """k = 0: sums of no terms, of the right shape."""
    x = torch.randn(2, 2, 0, requires_grad=True)
    packed, scales, biases = (
        t.requires_grad_(t.is_floating_point()) for t in make_weights(1, 3, 0)
    )
    index = torch.tensor([0, 1])
    y = ops.gather_qmm(x, packed, scales, biases, index, torch.tensor([0]), 128)
    assert torch.equal(y, torch.zeros(2, 2, 3))
    y.sum().backward()
    assert [t.grad.shape for t in (x, scales, biases)] == [(2, 2, 0), (1, 3, 0), (1, 3, 0)]


def test_packed_and_quantize_have_no_gradient():
    w = torch.randn(4, 64, requires_grad=True)
    packed, scales, biases = ops.quantize(w, 32)
    assert not any(t.requires_grad for t in (packed, scales, biases))


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_tangent_is_enough(symmetric):
    """The other inputs have none; biases that are absent follow scales."""
    packed, scales, biases = make_weights(4, 64, group_size=64, symmetric=symmetric)
    x, d = torch.randn(2, 64), torch.randn(4, 1)
    y, dy = torch.func.jvp(lambda s: ops.qmm(x, packed, s, biases, 64), (scales,), (d,))
    zero = None if symmetric else torch.zeros(4, 1)
    assert torch.equal(y, ops.qmm(x, packed, scales, biases, 64))
    assert torch.equal(dy, ops.qmm(x, packed, d, zero, 64))


def test_hessian_is_the_same_in_every_order_of_modes():
    packed, scales, biases = make_weights(4, 64, group_size=64, dtype=torch.float64)
    x = torch.randn(2, 64, dtype=torch.float64)
    f = lambda s: torch.tanh(ops.qmm(x, packed, s, biases, 64)).sum()
    modes = (torch.func.jacfwd, torch.func.jacrev)
    hessians = [outer(inner(f))(scales) for outer in modes for inner in modes]
    assert hessians[0].abs().max() > 0
    for hessian in hessians[1:]:
        torch.testing.assert_close(hessian, hessians[0])


def test_changing_a_saved_scale_in_place_is_caught():
    packed, scales, biases = make_weights(4, 64, group_size=64)
    x = torch.randn(2, 64, requires_grad=True)
    y = ops.qmm(x, packed, scales, biases, 64)
    scales.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_frozen_levels_hold_no_activations():
    """As nn.Linear with a frozen weight does not save its input."""
    saved = []
    packed, scales, biases = make_weights(4, 64, group_size=64)
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.qmm(x, packed, scales, biases, 64)
    assert not any(t.shape == x.shape for t in saved)


def test_functional_transforms_go_through():
    packed, scales, biases = make_weights(4, 64, group_size=64)
    x = torch.randn(3, 64)
    weight = ops.dequantize(packed, scales, biases, 64)
    loss = lambda x: ops.qmm(x, packed, scales, biases, 64).square().sum()
    plain = lambda x: (x @ weight.T).square().sum()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.grad(plain)(x))
    value, pull = torch.func.vjp(lambda s: ops.qmm(x, packed, s, biases, 64), scales)
    expected = ops.affine_grad(torch.ones_like(value), x, packed, None, None, 64)[0]
    torch.testing.assert_close(pull(torch.ones_like(value))[0], expected)


def test_compiled_autograd_of_a_compiled_step_gives_the_same_gradients():
    """That of PyTorch makes modules while frames are compiled: hooks on modules are among them."""
    model = thaw_levels_(quantize_(torch.nn.Sequential(torch.nn.Linear(64, 8)), group_size=32))
    x = torch.randn(3, 64)

    def step() -> list[Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters()]

    expected = [t.clone() for t in step()]
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend="aot_eager")()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("name", ["fake_quantize", "fake_quantize_affine", *NAMES])
def test_compiled_autograd_gives_the_same_gradients(name):
    w, levels = torch.randn(3, 64, requires_grad=True), torch.rand(2, 3, 2, requires_grad=True)
    op, arguments = {
        "fake_quantize": (ops.fake_quantize, (w, "mean", 32)),
        "fake_quantize_affine": (ops.fake_quantize_affine, (w, *levels, 32)),
        **calls(),
    }[name]
    inputs = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]

    def gradients() -> list[Tensor]:
        result = op(*arguments)
        results = result if isinstance(result, tuple) else (result,)
        return torch.autograd.grad(sum(t.square().sum() for t in results), inputs)

    expected = gradients()
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        torch.testing.assert_close(gradients(), expected)
