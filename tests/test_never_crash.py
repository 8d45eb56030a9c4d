"""Whatever a direct call is given, it returns a tensor or raises; it never ends the process."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_onebit  # noqa: F401

SIZES = (0, 1, 2, 3, 4, 31, 32, 64, 65, 96, 128, 256)
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint8,
)
TESTS = Path(__file__).parent
REFUSALS = (ValueError, IndexError, RuntimeError, TypeError, NotImplementedError)


def any_tensor(choose: random.Random) -> torch.Tensor:
    """Any shape, dtype, stride, offset, device and content."""
    shape = [choose.choice(SIZES) for _ in range(choose.randint(0, 4))]
    dtype = choose.choice(DTYPES)
    t = torch.empty(shape).uniform_(-4, 4)
    if choose.random() < 0.2 and t.numel():
        t.view(-1)[choose.randrange(t.numel())] = choose.choice([float("nan"), float("inf"), -1e38])
    t = t.to(torch.int64).to(dtype) if not dtype.is_floating_point else t.to(dtype)
    if t.dim() and choose.random() < 0.3:
        t = t.transpose(0, -1)
    if t.dim() and choose.random() < 0.2:
        t = t[..., ::2]
    if t.dim() and choose.random() < 0.1:
        t = t[:1].expand(choose.choice(SIZES), *t.shape[1:]) if t.shape[0] else t
    return t.to("meta") if choose.random() < 0.05 else t


LINEAR = (
    "prepack",
    "unprepack",
    "qmm_prepacked",
    "qmm_prepacked_each",
    "linear",
    "linear_prepacked",
)


def near_legal(op: str, choose: random.Random) -> dict:
    """Arguments of an operator that are legal but for what the caller then spoils."""
    group_size = choose.choice([32, 64, 128])
    rows, groups, matrices = choose.choice(SIZES), choose.randint(0, 3), choose.randint(0, 3)
    columns = groups * group_size
    lead = [matrices] if op in ("gather_qmm", "affine_grad") or choose.random() < 0.2 else []
    transpose = choose.random() < 0.5
    n, k = (rows, columns) if transpose else (columns, rows)
    level = choose.choice(DTYPES[:4])
    packed = torch.randint(-(2**31), 2**31, (*lead, rows, columns // 32)).to(torch.int32)
    scales = torch.randn(*lead, rows, groups).to(level)
    weights = {"packed": packed, "scales": scales}
    weights["biases"] = choose.choice([None, torch.randn_like(scales)])
    m, batch = choose.choice(SIZES), choose.randint(0, 4)
    x = torch.randn(batch, m, k).to(choose.choice(DTYPES[:4]))
    indices = {
        "lhs_indices": choose.choice([None, torch.randint(-1, batch + 1, (batch,))]),
        "rhs_indices": choose.choice([None, torch.randint(-1, matrices + 1, (batch,))]),
    }
    if op == "quantize":
        return {"w": x[..., :columns], "group_size": group_size}
    if op == "dequantize":
        return {**weights, "group_size": group_size}
    if op == "embedding":
        rows_named = torch.randint(-1, rows + 1, (batch, 2))
        return {"indices": rows_named, **weights, "group_size": group_size}
    if op in LINEAR:
        return near_legal_linear(op, weights, group_size, choose)
    common = {"group_size": group_size, "transpose": transpose}
    if op == "qmm":
        return {"x": x, **weights, **common}
    if op == "gather_qmm":
        return {"x": x, **weights, **indices, **common}
    grad = torch.randn(batch, m, n).to(x.dtype)
    return {"grad": grad, "x": x, "packed": packed, **indices, **common}


def near_legal_linear(op: str, weights: dict, group_size: int, choose: random.Random) -> dict:
    arguments = {**weights, "group_size": group_size}
    if op == "prepack":
        return arguments
    rows, words = weights["packed"].shape[-2:]
    x = torch.randn(choose.randint(0, 6), words * 32).to(choose.choice(DTYPES[:4]))
    bias = choose.choice([None, torch.randn(rows)])
    if op == "linear":
        return {"x": x, **arguments, "bias": bias}
    try:
        prepacked = torch.ops.onebit.prepack(**arguments)
    except REFUSALS:
        prepacked = torch.zeros(choose.choice([0, 1280]), dtype=torch.uint8)
    symmetric = weights["biases"] is None
    form = {"rows": rows, "columns": words * 32, "group_size": group_size}
    form |= {"dtype": weights["scales"].dtype, "symmetric": symmetric}
    if op == "unprepack":
        return {"prepacked": prepacked, **form}
    if op == "qmm_prepacked_each":
        count = choose.randint(1, 4)
        return {"x": x, "prepacked": [prepacked] * count, **form, "rows": [rows] * count}
    arguments = {"x": x, "prepacked": prepacked, **form}
    return arguments if op == "qmm_prepacked" else {**arguments, "bias": bias}


def attack(op: str, seed: int, calls: int) -> tuple[int, int]:
    """Call an operator with legal and spoiled arguments; (how many returned, how many refused)."""
    choose = random.Random(f"{op} {seed}")
    torch.manual_seed(seed)
    returned = refused = 0
    for _ in range(calls):
        arguments = near_legal(op, choose)
        for name in list(arguments):
            if choose.random() < 0.15:
                number = choose.choice([-1, 0, 16, 32, 2**31, 2**62])
                is_number = isinstance(arguments[name], int)
                arguments[name] = number if is_number else any_tensor(choose)
        try:
            getattr(torch.ops.onebit, op)(**arguments)
            returned += 1
        except REFUSALS:
            refused += 1
    return returned, refused


def attack_every_isa(op: str, seed: int, calls: int) -> None:
    """Attack with each CPU kernel table; a line says which one was running if the process dies."""
    for isa in torch.ops.onebit.cpu_isas():
        torch.ops.onebit.set_cpu_isa(isa)
        print(isa, end=" ", flush=True)
        print(*attack(op, seed, calls), flush=True)


@pytest.mark.parametrize(
    "op",
    [
        "quantize",
        "dequantize",
        "embedding",
        "qmm",
        "gather_qmm",
        "affine_grad",
        *LINEAR,
    ],
)
def test_arbitrary_arguments_never_end_the_process(op):
    script = f"import test_never_crash as t; t.attack_every_isa({op!r}, 0, 150)"
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
    )
    assert run.returncode == 0, f"exit code {run.returncode}\n{run.stdout}\n{run.stderr[-2000:]}"
    for line in run.stdout.splitlines():
        _, returned, refused = line.split()
        assert int(returned) > 10
        assert int(refused) > 10
