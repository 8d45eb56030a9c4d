"""``selftest --report FILE``: what is needed to tune csrc/mps/launch_plan.h, as JSON."""

import json
from pathlib import Path

import torch

import torch_onebit
from torch_onebit.selftest.cases import Row, forced_kernel
from torch_onebit.selftest.speed import Speed, speed

# transpose, kernel, rows of x: each kernel where a rule may choose it, and around
MEASURED = [
    (True, "qmv", (1,)),
    (True, "qmv_wide", (2, 3, 4, 5, 6, 7, 8)),
    (True, "qmm", (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 128, 512)),
    (True, "qmm_tensor", (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 512)),
    (False, "qvm", (1,)),
    (False, "qmm_n", (1, 2, 4, 8, 32, 128)),
    (False, "qmm_n_tensor", (2, 4, 8, 32, 128)),
]


def tuning() -> tuple[dict, list[dict]]:
    """The GPU as launch_plan.h sees it, and the rules of its table."""
    head, *lines = torch.ops.onebit.mps_tuning().splitlines()
    family, cores, tensor_operations = map(int, head.split())
    rules = []
    for line in lines:
        transpose, min_family, max_m, kernel = line.split()
        rules.append(
            {
                "transpose": transpose == "1",
                "min_family": int(min_family),
                "max_m": int(max_m),
                "kernel": kernel,
            }
        )
    gpu = {"family": family, "cores": cores, "tensor_operations": bool(tensor_operations)}
    return gpu, rules


def can_compute(kernel: str, gpu: dict, dtype: torch.dtype) -> bool:
    tensor = kernel.endswith("_tensor")
    return not tensor or (gpu["tensor_operations"] and dtype != torch.float32)


def chosen_rule(rules: list[dict], gpu: dict, s: Speed) -> int:
    """Index of the rule that plans this product: the first that fits."""
    return next(
        i
        for i, r in enumerate(rules)
        if r["transpose"] == s.transpose
        and gpu["family"] >= r["min_family"]
        and s.m <= r["max_m"]
        and can_compute(r["kernel"], gpu, s.dtype)
    )


def measure(gpu: dict, seconds: float) -> list[Speed]:
    found = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for transpose, kernel, row_counts in MEASURED:
            if not can_compute(kernel, gpu, dtype):
                continue
            with forced_kernel(kernel):
                for m in row_counts:
                    found.append(
                        speed(m, transpose, "mps", kernel=kernel, dtype=dtype, seconds=seconds)
                    )
    return found


def write_report(path: str, machine: str, rows: list[Row], seconds: float = 0.1) -> None:
    gpu, rules = tuning()
    speeds = measure(gpu, seconds)
    report = {
        "torch_onebit": torch_onebit.__version__,
        "torch": torch.__version__,
        "machine": machine,
        "gpu": gpu,
        "rules": rules,
        "checks": [
            {
                "kernel": r.kernel,
                "dtype": str(r.dtype).removeprefix("torch."),
                "error": r.error,
                "allowed": r.allowed,
                "passed": r.passed,
            }
            for r in rows
        ],
        "speeds": [
            {
                "kernel": s.kernel,
                "m": s.m,
                "n": s.size,
                "k": s.size,
                "transpose": s.transpose,
                "dtype": str(s.dtype).removeprefix("torch."),
                "microseconds": s.microseconds,
                "gigabytes_per_second": s.gigabytes_per_second,
                "rule": chosen_rule(rules, gpu, s),
            }
            for s in speeds
        ],
    }
    Path(path).write_text(json.dumps(report, indent=1) + "\n")
