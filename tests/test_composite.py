"""Devices without kernels: operators as plain PyTorch, run by asking for another device."""

import subprocess
import sys

import numpy as np
import pytest
import reference
import torch
from helpers import make_weights, to_numpy
from test_autograd import calls
from test_errors import OUT_OF_RANGE, ROWS, valid
from test_golden import assert_same_bits
from test_quantize import INPUTS
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

ops = torch.ops.onebit

TRACED = {  # operator, shape of x, of packed, indices or None, transpose
    "matrix": ("qmm", (5, 64), (8, 2), None, True),
    "batch": ("qmm", (3, 5, 64), (3, 8, 2), None, True),
    "gathered": ("gather_qmm", (4, 5, 64), (3, 8, 2), [2, 0, 0, 1], True),
    "gradient of levels": ("affine_grad", (5, 64), (8, 2), None, True),
    "of a batch, the other way": ("affine_grad", (3, 5, 8), (3, 8, 2), None, False),
    "of gathered matrices": ("affine_grad", (4, 5, 64), (3, 8, 2), [2, 0, 0, 1], True),
    "all rows decoded": ("dequantize", None, (8, 2), None, True),
    "rows decoded": ("embedding", None, (8, 2), [7, 0, 0], True),
}


def call_of(op, x_shape, packed_shape, indices, transpose, device="cpu"):
    """A call of the operator and its arguments."""
    packed = torch.randint(-(2**31), 2**31, packed_shape, dtype=torch.int32, device=device)
    scales = torch.randn(*packed_shape[:-1], 1, device=device)
    index = None if indices is None else torch.tensor(indices, device=device)
    weights = [packed, scales, scales - 1]
    if op == "dequantize":
        return lambda *a: ops.dequantize(*a, 64), weights
    if op == "embedding":
        return lambda *a: ops.embedding(*a, 64), [index, *weights]
    x = torch.randn(x_shape, device=device)
    if op == "affine_grad":
        outputs = packed_shape[-2] if transpose else packed_shape[-1] * 32
        grad = torch.randn(*x_shape[:-1], outputs, device=device)
        pair = [grad.double(), x.double(), packed]  # no order of sums shows
        if index is None:
            return lambda *a: ops.affine_grad(*a, None, None, 64, transpose), pair
        return lambda *a: ops.affine_grad(*a[:3], None, a[3], 64, transpose), [*pair, index]
    if op == "qmm":
        return lambda *a: ops.qmm(*a, 64), [x, *weights]
    return lambda *a: ops.gather_qmm(*a[:4], None, a[4], 64), [x, *weights, index]


def traced(case, device):
    """The graph of an operator on a device that need not be there."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        call, arguments = call_of(*TRACED[case], device)
        return make_fx(call, tracing_mode="symbolic", pre_dispatch=False)(*arguments)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", TRACED)
def test_compilers_see_what_an_operator_is_made_of_where_there_are_no_kernels(case):
    """To fuse it; and hear no warning, for then nothing is slow."""
    kernels = {str(node.target) for node in traced(case, "cpu").graph.nodes}
    assert any("onebit" in name for name in kernels)
    graph = traced(case, "xpu")
    assert not any("onebit" in str(node.target) for node in graph.graph.nodes)
    for node in graph.graph.nodes:  # run it here
        if "device" in node.kwargs:
            node.update_kwarg("device", torch.device("cpu"))
    graph.recompile()
    call, arguments = call_of(*TRACED[case])
    torch.testing.assert_close(graph(*arguments), call(*arguments))


def composite(op, *args, **kwargs):
    """What op would run for tensors on a device without kernels."""
    return op.default.redispatch(DispatchKeySet(DispatchKey.XPU), *args, **kwargs)


@pytest.mark.parametrize("name", [n for n in calls()])
def test_composite_equals_the_kernels(name):
    op, arguments = calls()[name]
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.testing.assert_close(composite(op, *detached), op(*detached))


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_composite_quantizes_and_decodes_the_same_bits(name, dtype):
    w = INPUTS[name](64).to(dtype)
    actual, expected = composite(ops.quantize, w, 64), ops.quantize(w, 64)
    assert torch.equal(actual[0], expected[0])
    assert_same_bits(actual[1], expected[1])
    assert_same_bits(actual[2], expected[2])
    assert_same_bits(composite(ops.dequantize, *expected, 64), ops.dequantize(*expected, 64))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_composite_sums_in_float32(x_dtype):
    packed, scales, biases = make_weights(40, 512, dtype=torch.float16)
    x = torch.randn(3, 512).to(x_dtype)
    y = composite(ops.qmm, x, packed, scales, biases, 128)
    exact = reference.qmm(to_numpy(x), *(to_numpy(t) for t in (packed, scales, biases)), 128)
    assert y.dtype == x_dtype
    error = np.linalg.norm(to_numpy(y) - exact) / np.linalg.norm(exact)
    assert error <= 2 * torch.finfo(x_dtype).eps


@pytest.mark.parametrize("op, argument, spoil, start, value", ROWS[::3])
def test_composite_refuses_what_kernels_refuse(op, argument, spoil, start, value):
    arguments = valid(op)
    arguments[argument] = spoil(arguments[argument])
    with pytest.raises(ValueError) as error:
        composite(getattr(ops, op), **arguments)
    assert str(error.value).startswith(start)


@pytest.mark.parametrize("op, argument, values, message", OUT_OF_RANGE)
def test_composite_refuses_an_index_out_of_range(op, argument, values, message):
    arguments = {**valid(op), argument: torch.tensor(values)}
    with pytest.raises((IndexError, RuntimeError)):
        composite(getattr(ops, op), **arguments)


@pytest.mark.parametrize(
    "m, n, k, batch", [(2, 3, 0, 2), (2, 0, 64, 2), (0, 3, 64, 2), (2, 3, 64, 0)]
)
def test_composite_of_nothing_equals_the_kernels(m, n, k, batch):
    packed, scales, biases = make_weights(1, n, k, group_size=32)
    x, grad = torch.randn(batch, m, k), torch.randn(batch, m, n)
    rhs = torch.zeros(batch, dtype=torch.int64)
    flat = [t[0] for t in (packed, scales, biases)]
    for op, args in [
        (ops.quantize, (x, 32)),
        (ops.dequantize, (packed, scales, biases, 32)),
        (ops.embedding, (rhs[: min(batch, n)], *flat, 32)),
        (ops.qmm, (x, *flat, 32)),
        (ops.qmm, (x, packed, scales, biases, 32)),
        (ops.gather_qmm, (x, packed, scales, biases, None, rhs, 32)),
        (ops.affine_grad, (grad, x, flat[0], None, None, 32)),
        (ops.affine_grad, (grad, x, packed, None, rhs, 32)),
    ]:
        torch.testing.assert_close(composite(op, *args), op(*args))


@pytest.mark.parametrize("name", [*calls(), "quantize"])
def test_composite_reads_nothing_back_from_the_device(name):
    """On the meta device there is nothing to read: a hidden synchronization would fail."""
    op, arguments = {"quantize": (ops.quantize, (torch.randn(3, 64), 32)), **calls()}[name]
    meta = [a.detach().to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    actual, expected = composite(op, *meta), op(*arguments)
    shapes = lambda result: [t.shape for t in (result if isinstance(result, tuple) else (result,))]
    assert shapes(actual) == shapes(expected)


@pytest.mark.parametrize(
    "op, rest",
    [("quantize", "64"), ("fake_quantize", "'mean', 64"), ("quantize_levels", "'mean', 64")],
)
def test_composite_announces_itself_once(op, rest):
    script = f"""
import torch, torch_onebit
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
op, w = torch.ops.onebit.{op}.default, torch.randn(2, 64)
for _ in range(3):
    op.redispatch(DispatchKeySet(DispatchKey.XPU), w, {rest})
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stderr.count(f"torch_onebit has no kernel of {op} for cpu devices") == 1
