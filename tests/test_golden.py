"""Outputs of MLX itself, kept in data/mlx_golden.npz: the same bits, and qmm to float32
accuracy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = np.load(Path(__file__).parent / "data" / "mlx_golden.npz")
CASES = json.loads(GOLDEN["meta"].tobytes())["cases"]
ops = torch.ops.onebit

BITS_OF = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def cases_of(*names: str) -> list:
    def label(case: dict) -> str:
        kind = case.get("kind", "t" if case.get("transpose", True) else "n")
        return f"{case['op']}-{case['dtype']}-g{case['group_size']}-{kind}-{case['id']}"

    return [pytest.param(case, id=label(case)) for case in CASES if case["op"] in names]


class Arrays:
    """The arrays of one case as tensors, 16-bit floats reinterpreted from their bits."""

    def __init__(self, case: dict) -> None:
        self.case = case
        self.dtype = getattr(torch, case["dtype"])

    def __getattr__(self, name: str) -> Tensor:
        array = GOLDEN[f"c{self.case['id']}.{name}"]
        if array.dtype == np.uint16:
            return torch.from_numpy(array.view(np.int16).copy()).view(self.dtype)
        if array.dtype == np.uint32:
            return torch.from_numpy(array.view(np.int32).copy())
        return torch.from_numpy(array.copy())


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit; a NaN equals any NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(actual), nan)
    as_bits = BITS_OF[actual.dtype]
    assert torch.equal(actual.view(as_bits)[~nan], expected.view(as_bits)[~nan])


@pytest.mark.parametrize("case", cases_of("quantize"))
def test_quantize_and_dequantize_equal_mlx(case, isa):
    a, group_size = Arrays(case), case["group_size"]
    packed, scales, biases = ops.quantize(a.w, group_size)
    assert torch.equal(packed, a.wq)
    assert_same_bits(scales, a.scales)
    assert_same_bits(biases, a.biases)
    assert_same_bits(ops.dequantize(a.wq, a.scales, a.biases, group_size), a.deq)


@pytest.mark.parametrize("case", cases_of("embedding"))
def test_embedding_equals_mlx(case, isa):
    a = Arrays(case)
    assert_same_bits(ops.embedding(a.ids, a.wq, a.scales, a.biases, case["group_size"]), a.y)


def assert_close_to_float32(y: Tensor, y32: Tensor) -> None:
    """Within the rounding of y's dtype of MLX's own float32 result."""
    unit = torch.finfo(y.dtype).eps
    assert y.shape == y32.shape
    largest = y32.abs().max()
    assert ((y.float() - y32).abs() <= 2 * unit * y32.abs() + 1e-5 * largest).all()


@pytest.mark.parametrize("case", cases_of("qmm", "qmm_batched"))
def test_qmm_agrees_with_mlx(case, isa):
    a = Arrays(case)
    y = ops.qmm(a.x, a.wq, a.scales, a.biases, case["group_size"], case["transpose"])
    assert_close_to_float32(y, a.y32)


@pytest.mark.parametrize("case", cases_of("linear"))
def test_linear_agrees_with_mlx(case, isa):
    a = Arrays(case)
    y = ops.qmm(a.x.float(), a.wq, a.scales, a.biases, case["group_size"])
    assert_close_to_float32(y + a.bias.float(), a.y32)


@pytest.mark.parametrize("case", cases_of("gather_qmm"))
def test_gather_qmm_agrees_with_mlx(case, isa):
    a = Arrays(case)
    y = ops.gather_qmm(a.x, a.wq, a.scales, a.biases, None, a.idx, case["group_size"])
    assert_close_to_float32(y, a.y32)


@pytest.mark.parametrize("case", cases_of("vjp"))
def test_gradients_agree_with_mlx(case, isa):
    a = Arrays(case)
    inputs = [t.requires_grad_() for t in (a.x, a.scales, a.biases)]
    x, scales, biases = inputs
    y = ops.qmm(x, a.wq, scales, biases, case["group_size"], case["transpose"])
    for actual, expected in zip(
        torch.autograd.grad(y, inputs, a.c), (a.dx, a.ds, a.db), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
