"""``python -m torch_onebit selftest``: every Metal or CUDA kernel against the CPU, on this GPU.

The table it prints is one page to attach to a report.
"""

import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import torch_onebit
from torch_onebit.ops import (
    RULES,
    fake_quantize,
    fake_quantize_affine,
    fake_quantize_affine_backward,
    fake_quantize_backward,
    quantize_levels,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Product:
    """One product and the kernel it is meant to reach."""

    kernel: str
    m: int
    rows: int
    columns: int
    transpose: bool = True
    timed: bool = False  # also at a real size
    group_size: int = 64


METAL_PRODUCTS = [
    Product("qmv", 1, 71, 320, timed=True),
    *(Product(f"qmv_wide, {m} rows", m, 71, 320, timed=m in (4, 8)) for m in (2, 3, 4, 6, 8)),
    Product("qmm", 70, 71, 320, timed=True),
    Product("qmm, 32 rows", 20, 71, 320, timed=True),
    Product("qmm, k split", 16, 32, 2048),
    Product("qmm, k split, 64 rows", 40, 32, 2048),
    Product("qvm", 1, 70, 320, transpose=False, timed=True),
    Product("qvm, k split", 1, 2048, 128, transpose=False),
    Product("qmm_n", 40, 70, 320, transpose=False, timed=True),
    Product("qmm_n, k split", 16, 2048, 128, transpose=False),
]
CUDA_PRODUCTS = [
    *(Product(f"b1, {m} rows", m, 71, 512, timed=m == 1, group_size=128) for m in (1, 2, 4)),
    Product("hmma", 1, 71, 320),
    Product("hmma, groups of 128", 8, 71, 640, timed=True, group_size=128),
    Product("hmma or wgmma, 16 rows", 16, 71, 320),
    Product("wgmma, 32 rows", 30, 200, 512, timed=True),
    Product("wgmma, 128 rows", 100, 200, 640),
    Product("wgmma, 256 rows", 300, 8200, 256),
    Product("wgmma, k split", 40, 128, 2048),
    Product("decode and cuBLAS", 1100, 71, 320),
    Product("not transposed", 3, 70, 320, transpose=False),
]
PRODUCTS = {"mps": METAL_PRODUCTS, "cuda": CUDA_PRODUCTS}
REAL_SIZE = 4096  # rows and columns of the timed products


@dataclass
class Row:
    kernel: str
    dtype: torch.dtype
    error: float
    allowed: float
    gigabytes_per_second: float | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        speed = f"{self.gigabytes_per_second:8.1f}" if self.gigabytes_per_second else " " * 8
        verdict = "ok" if self.passed else "FAIL"
        name = str(self.dtype).removeprefix("torch.")
        errors = f"{self.error:9.1e} {self.allowed:9.1e}"
        return f"{self.kernel:<27} {name:<9} {errors}  {verdict:<5}{speed}"


def make_weights(rows: int, columns: int, dtype: torch.dtype, group_size: int = 64):
    """Random packed weights on the CPU."""
    packed = torch.randint(-(2**31), 2**31, (rows, columns // 32)).to(torch.int32)
    scales = torch.rand(rows, columns // group_size) + 0.5
    return packed, scales.to(dtype), (-scales * 0.45).to(dtype), group_size


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.cpu().double() - expected).norm() / expected.norm())


def product_row(case: Product, dtype: torch.dtype, device: str) -> Row:
    packed, scales, biases, group_size = make_weights(
        case.rows, case.columns, dtype, case.group_size
    )
    x = torch.randn(case.m, case.columns if case.transpose else case.rows).to(dtype)
    weights = (packed, scales, biases, group_size)
    exact = torch_onebit.qmm(x.double(), *weights, case.transpose)
    w = torch_onebit.dequantize(*weights)
    plain = x @ (w.mT if case.transpose else w)
    moved = (packed.to(device), scales.to(device), biases.to(device), group_size)
    y = torch_onebit.qmm(x.to(device), *moved, case.transpose)
    allowed = max(2 * relative_error(plain, exact), 0.5 * torch.finfo(dtype).eps)
    return Row(case.kernel, dtype, relative_error(y, exact), allowed)


def gather_row(dtype: torch.dtype, device: str, is_sorted: bool) -> Row:
    experts, tokens = 4, 48
    packed, scales, biases, group_size = make_weights(experts * 64, 256, dtype)
    stacked = [t.view(experts, 64, -1) for t in (packed, scales, biases)]
    x = torch.randn(tokens, 1, 256).to(dtype)
    chosen = torch.randint(0, experts, (tokens,))
    chosen = chosen.sort().values if is_sorted else chosen
    exact = torch_onebit.gather_qmm(x.double(), *stacked, rhs_indices=chosen, group_size=group_size)
    w = torch_onebit.dequantize(packed, scales, biases, group_size).view(experts, 64, 256)
    plain = x @ w[chosen].mT
    y = torch_onebit.gather_qmm(
        x.to(device),
        *(t.to(device) for t in stacked),
        rhs_indices=chosen.to(device),
        group_size=group_size,
        sorted_indices=is_sorted,
    )
    allowed = max(2 * relative_error(plain, exact), 0.5 * torch.finfo(dtype).eps)
    name = "gather, sorted" if is_sorted else "gather"
    return Row(name, dtype, relative_error(y, exact), allowed)


def exact_rows(dtype: torch.dtype, device: str) -> Iterator[Row]:
    """quantize, dequantize and embedding give the CPU's bits: the error counts differences."""
    w = torch.randn(33, 384).to(dtype)
    w[0], w[1] = -w[0].abs(), 0.0
    cpu = torch_onebit.quantize(w, 128)
    gpu = torch_onebit.quantize(w.to(device), 128)
    ids = torch.tensor([32, 0, 7])
    pairs = {
        "quantize": (torch.cat([t.flatten() for t in cpu]), torch.cat([t.flatten() for t in gpu])),
        "dequantize": (torch_onebit.dequantize(*cpu, 128), torch_onebit.dequantize(*gpu, 128)),
        "embedding": (
            torch_onebit.embedding(ids, *cpu, 128),
            torch_onebit.embedding(ids.to(device), *gpu, 128),
        ),
    }
    for kernel, (expected, actual) in pairs.items():
        yield Row(kernel, dtype, float((actual.cpu() != expected).sum()), 0)


def level_rows(dtype: torch.dtype, device: str) -> Iterator[Row]:
    """Choosing levels and training through them, each rule. Forward gives the CPU's bits."""
    w, grad = torch.randn(2, 33, 384).to(dtype)
    scales, biases = torch.randn(2, 33, 3)
    calls = {
        "fake_quantize_affine": (fake_quantize_affine, w, scales, biases),
        "fake_quantize_affine, bwd": (fake_quantize_affine_backward, grad, w, scales, biases),
    }
    for rule in RULES:
        calls[f"quantize, {rule}"] = (quantize_levels, w, rule)
        calls[f"fake_quantize, {rule}"] = (fake_quantize, w, rule)
        calls[f"fake_quantize, {rule}, bwd"] = (fake_quantize_backward, grad, w, rule)
    for kernel, (op, *arguments) in calls.items():
        moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
        results = [op(*a, 128) for a in (arguments, moved)]
        cpu, gpu = (r if isinstance(r, tuple) else (r,) for r in results)
        backward = kernel.endswith("bwd")
        error = max(
            relative_error(b, a.double()) if backward else float((b.cpu() != a).sum())
            for a, b in zip(cpu, gpu, strict=True)
        )
        yield Row(kernel, dtype, error, 2 * torch.finfo(dtype).eps if backward else 0)


def flip_bits_row(device: str) -> Row:
    """One block of coordinate descent; the error counts bits that differ."""
    x, error = torch.randn(200, 256), torch.randn(33, 256)
    moments, scales, bits = x.T @ x / 200, torch.rand(33, 4), torch.rand(33, 256) > 0.5
    moved = [t.to(device, copy=True) for t in (bits, error, scales, moments)]
    for arguments in ((bits, error, scales, moments), moved):
        torch.ops.onebit.flip_bits_(*arguments, 64, 192, 64)
    return Row("flip_bits_", torch.float32, float((moved[0].cpu() != bits).sum()), 0)


def affine_grad_row(dtype: torch.dtype, device: str) -> Row:
    packed, *_, group_size = make_weights(71, 320, dtype)
    x, grad = torch.randn(40, 320).to(dtype), torch.randn(40, 71).to(dtype)
    exact = torch_onebit.affine_grad(grad.double(), x.double(), packed, group_size=group_size)
    ours = torch_onebit.affine_grad(
        grad.to(device), x.to(device), packed.to(device), group_size=group_size
    )
    error = max(relative_error(a, b) for a, b in zip(ours, exact, strict=True))
    return Row("affine_grad", dtype, error, 1e-6)


def bandwidth(case: Product, device: str) -> float:
    """GB/s of everything the product must read and write once, in float16."""
    packed, scales, biases, group_size = make_weights(REAL_SIZE, REAL_SIZE, torch.float16, 128)
    x = torch.randn(case.m, REAL_SIZE).half().to(device)
    weights = (packed.to(device), scales.to(device), biases.to(device), group_size)
    torch_onebit.qmm(x, *weights, case.transpose)
    synchronize = getattr(torch, device).synchronize
    synchronize()
    repeat, elapsed = 1, 0.0
    while elapsed < 0.3:
        repeat *= 2
        start = time.perf_counter()
        for _ in range(repeat):
            torch_onebit.qmm(x, *weights, case.transpose)
        synchronize()
        elapsed = time.perf_counter() - start
    moved = sum(t.numel() * t.element_size() for t in (packed, scales, biases, x, x))
    return moved * repeat / elapsed / 1e9


def rows(device: str, measure: bool = True) -> Iterator[Row]:
    """Every check, one after the other. Without ``measure`` nothing is timed."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        yield from exact_rows(dtype, device)
        yield from level_rows(dtype, device)
        for case in PRODUCTS[device]:
            row = product_row(case, dtype, device)
            if measure and case.timed and dtype == torch.float16:
                row.gigabytes_per_second = bandwidth(case, device)
            yield row
        for is_sorted in (False, True):
            yield gather_row(dtype, device, is_sorted)
        yield affine_grad_row(dtype, device)
    yield flip_bits_row(device)


def machine() -> str:
    """The chip and the system, as a report needs them."""
    chip = platform.processor()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        chip = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    elif torch.cuda.is_available():
        chip = torch.cuda.get_device_name()
    return f"{chip}, {platform.platform()}"


def run() -> None:
    """Print the table; exit with an error when a kernel fails or there is no GPU with kernels."""
    is_there = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    device = next((name for name, found in is_there.items() if found), None)
    if device is None:
        raise SystemExit("selftest needs an Apple or NVIDIA GPU that torch can use, and found none")
    print(f"torch_onebit {torch_onebit.__version__}, torch {torch.__version__}, {machine()}")
    print(f"{'kernel':<27} {'dtype':<9} {'error':>9} {'allowed':>9}  {'':<5}{'GB/s':>8}")
    failed = 0
    for row in rows(device):
        print(row, flush=True)
        failed += not row.passed
    if failed:
        raise SystemExit(f"{failed} kernels failed")
    print("all kernels agree with the CPU")
