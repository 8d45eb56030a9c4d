"""The checks: what is computed on the GPU and on the CPU, and how far apart the results may be."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

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
GROUPS = (32, 64, 128)


@dataclass
class Row:
    kernel: str
    dtype: torch.dtype
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # not so when it is NaN

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAIL"
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel:<32} {name:<9} {self.error:9.1e} {self.allowed:9.1e}  {verdict}"


@dataclass
class Check:
    kernel: str
    dtype: torch.dtype
    measure: Callable[[], tuple[float, float]]  # the error, and what is allowed

    def run(self) -> Row:
        return Row(self.kernel, self.dtype, *self.measure())


@dataclass
class Product:
    """One product and the kernel it is meant to reach.

    Without a group size, each dtype takes another, one of them without biases and one with levels
    of another dtype.
    """

    kernel: str
    m: int
    rows: int
    columns: int
    transpose: bool = True
    group_size: int | None = None
    biases: bool = True
    level_dtype: torch.dtype | None = None
    forced: str = ""  # the kernel, whatever the rules of this GPU say


METAL_PRODUCTS = [
    Product("qmv", 1, 71, 384),
    *(Product(f"qmv_wide, {m} rows", m, 71, 384) for m in (2, 3, 4, 6, 8)),
    Product("qmm", 70, 71, 384, forced="qmm"),
    Product("qmm, 32 rows", 20, 71, 384, forced="qmm"),
    Product("qmm, k split", 16, 32, 2048, forced="qmm"),
    Product("qmm, k split, 64 rows", 40, 32, 2048, forced="qmm"),
    Product("many rows, by the rules", 70, 71, 384),
    Product("qvm", 1, 70, 384, transpose=False),
    Product("qvm, k split", 1, 2048, 128, transpose=False),
    Product("qmm_n", 40, 70, 384, transpose=False, forced="qmm_n"),
    Product("qmm_n, k split", 16, 2048, 128, transpose=False, forced="qmm_n"),
]
# Where the GPU has tensor operations; of x of 16 bits.
TENSOR_PRODUCTS = [
    Product(f"{kernel}, {size}", m, rows, columns, kernel == "qmm_tensor", forced=kernel)
    for kernel, size, m, rows, columns in [
        ("qmm_tensor", "32 rows", 20, 71, 384),
        ("qmm_tensor", "64 rows", 40, 71, 384),
        ("qmm_tensor", "128 rows", 150, 71, 384),
        ("qmm_tensor", "32 rows, k split", 16, 32, 2048),
        ("qmm_tensor", "64 rows, k split", 40, 32, 2048),
        ("qmm_tensor", "128 rows, k split", 70, 32, 2048),
        ("qmm_n_tensor", "32 rows", 20, 70, 384),
        ("qmm_n_tensor", "64 rows", 40, 70, 384),
        ("qmm_n_tensor", "128 rows", 150, 70, 384),
        ("qmm_n_tensor", "32 rows, k split", 16, 2047, 128),
        ("qmm_n_tensor", "64 rows, k split", 40, 2047, 128),
        ("qmm_n_tensor", "128 rows, k split", 70, 2047, 128),
    ]
]
CUDA_PRODUCTS = [
    *(Product(f"b1, {m} rows", m, 71, 512, group_size=128) for m in (1, 2, 4)),
    Product("hmma", 1, 71, 320, group_size=64),
    Product("hmma, groups of 128", 8, 71, 640, group_size=128),
    Product("hmma or wgmma, 16 rows", 16, 71, 320, group_size=64),
    Product("wgmma or tiles, 30 rows", 30, 200, 512, group_size=64),
    Product("wgmma or tiles, 128 rows", 100, 200, 640, group_size=64),
    Product("wgmma or tiles, 300 rows", 300, 8200, 256, group_size=64),
    Product("wgmma or tiles, k split", 40, 128, 2048, group_size=64),
    Product("decode and cuBLAS", 1100, 71, 320, group_size=64),
    Product("not transposed", 3, 70, 320, transpose=False, group_size=64),
]


def has_tensor_operations() -> bool:
    """Does this Mac's GPU have Metal 4's, on a system that knows them?"""
    return torch.ops.onebit.mps_tuning().split()[2] == "1"


def products(device: str) -> list[Product]:
    """Products that together reach every kernel of this GPU."""
    if device == "cuda":
        return CUDA_PRODUCTS
    return METAL_PRODUCTS + (TENSOR_PRODUCTS if has_tensor_operations() else [])


def variants(products: list[Product]) -> Iterator[tuple[Product, torch.dtype]]:
    """Each product in each dtype, with other groups and levels in each."""
    for i, dtype in enumerate(DTYPES):
        for j, p in enumerate(products):
            if p.forced.endswith("_tensor") and dtype == torch.float32:
                continue
            if p.group_size is not None:
                yield p, dtype
                continue
            turn = (i + j) % 3
            other = DTYPES[(i + 1) % 3] if turn == 1 else None
            yield replace(p, group_size=GROUPS[turn], biases=turn > 0, level_dtype=other), dtype


def sorted_kernels(dtype: torch.dtype, device: str) -> list[str]:
    """Of rows that are sorted by matrix."""
    tensor = device == "mps" and dtype != torch.float32 and has_tensor_operations()
    return ["qmm_sorted", *(["qmm_sorted_tensor"] if tensor else [])]


def make_weights(
    rows: int, columns: int, dtype: torch.dtype, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Random packed weights on the CPU."""
    packed = torch.randint(-(2**31), 2**31, (rows, columns // 32)).to(torch.int32)
    scales = torch.rand(rows, columns // group_size) + 0.5
    return packed, scales.to(dtype), (-scales * 0.45).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.cpu().double() - expected).norm() / expected.norm())


def differences(actual: Tensor, expected: Tensor) -> float:
    """How many elements have other bits."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    return float((actual.cpu().view(bits) != expected.view(bits)).sum())


def on_gpu(device: str, op: Callable, arguments: tuple, like: Tensor | tuple[Tensor, ...]):
    """op on the GPU, where the memory that its results get held something else just before.

    PyTorch does not tell that a kernel was aborted: what it was to write then holds what was there.
    """
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    results = like if isinstance(like, tuple) else (like,)
    spoilt = [
        torch.full(
            t.shape, float("nan") if t.is_floating_point() else 90, dtype=t.dtype, device=device
        )
        for t in results
    ]
    del spoilt
    return op(*moved)


def product_error(case: Product, dtype: torch.dtype, device: str) -> tuple[float, float]:
    group_size = case.group_size
    weights = make_weights(case.rows, case.columns, case.level_dtype or dtype, group_size)
    weights = weights if case.biases else (*weights[:2], None)
    x = torch.randn(case.m, case.columns if case.transpose else case.rows).to(dtype)
    exact = torch_onebit.qmm(x.double(), *weights, group_size, case.transpose)
    w = torch_onebit.dequantize(*weights, group_size).to(dtype)
    plain = x @ (w.mT if case.transpose else w)
    with forced_kernel(case.forced):
        y = on_gpu(device, torch_onebit.qmm, (x, *weights, group_size, case.transpose), plain)
    return relative_error(y, exact), max(
        2 * relative_error(plain, exact), 0.5 * torch.finfo(dtype).eps
    )


@contextmanager
def forced_kernel(name: str) -> Iterator[None]:
    """Products that this Metal kernel can compute, it computes; "" leaves them to the rules."""
    if name:
        torch.ops.onebit.mps_force_kernel(name)
    try:
        yield
    finally:
        if name:
            torch.ops.onebit.mps_force_kernel("")


def gather_error(
    experts: int,
    is_sorted: bool,
    group_size: int,
    dtype: torch.dtype,
    device: str,
    forced: str = "",
) -> tuple[float, float]:
    tokens = 48
    weights = make_weights(experts * 40, 256, dtype, group_size)
    stacked = [t.view(experts, 40, -1) for t in weights]
    x = torch.randn(tokens, 1, 256).to(dtype)
    chosen = torch.randint(0, experts, (tokens,))
    chosen = chosen.sort().values if is_sorted else chosen
    exact = torch_onebit.gather_qmm(x.double(), *stacked, rhs_indices=chosen, group_size=group_size)
    w = torch_onebit.dequantize(*weights, group_size).view(experts, 40, 256)
    plain = x @ w[chosen].mT
    op = torch.ops.onebit.gather_qmm
    arguments = (x, *stacked, None, chosen, group_size, True, is_sorted)
    with forced_kernel(forced):
        y = on_gpu(device, op, arguments, plain)
    return relative_error(y, exact), max(
        2 * relative_error(plain, exact), 0.5 * torch.finfo(dtype).eps
    )


def exact_error(op: Callable, *arguments, device: str) -> tuple[float, float]:
    """The CPU's bits, in every result."""
    expected = op(*arguments)
    actual = on_gpu(device, op, arguments, expected)
    pairs = (
        zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
    )
    return sum(differences(a, e) for a, e in pairs), 0


def close_error(op: Callable, *arguments, device: str) -> tuple[float, float]:
    expected = op(*arguments)
    actual = on_gpu(device, op, arguments, expected)
    pairs = (
        zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
    )
    errors = [(relative_error(a, e.double()), e.dtype) for a, e in pairs]
    return max(e for e, _ in errors), 2 * torch.finfo(errors[0][1]).eps


def codec_checks(dtype: torch.dtype, device: str) -> Iterator[Check]:
    """quantize, dequantize and embedding."""
    ids = torch.tensor([32, 0, 7])
    for group_size in GROUPS:
        w = torch.randn(33, 384).to(dtype)
        w[0], w[1], w[2, ::2] = -w[0].abs(), 0.0, -0.0
        w[3, ::2], w[3, 1::2], w[3, ::32] = 1.0, 0.0, 0.5  # a tie is 0
        packed, scales, biases = torch_onebit.quantize(w, group_size)
        calls = {
            "quantize": (torch_onebit.quantize, w),
            "decode": (torch_onebit.dequantize, packed, scales, biases),
            "decode, no biases": (torch_onebit.dequantize, packed, scales, None),
            "decode, rows": (torch_onebit.embedding, ids, packed, scales, biases),
        }
        for name, call in calls.items():
            measure = partial(exact_error, *call, group_size, device=device)
            yield Check(f"{name}, {group_size}", dtype, measure)


def level_checks(dtype: torch.dtype, device: str) -> Iterator[Check]:
    """Choosing levels and training through them, each rule. Forward gives the CPU's bits."""
    i = DTYPES.index(dtype)
    w, grad = torch.randn(2, 33, 384).to(dtype)
    w[:4, ::3] = w[:4, ::3].round()  # ties
    w[4], w[5, ::2], w[6, ::2], w[6, 1::2] = 0.0, -1.0, 0.0, -0.0
    importance = torch.rand(384)
    for j, rule in enumerate(RULES):
        group_size = GROUPS[(i + j) % 3]
        forward = (fake_quantize, w, rule, group_size)
        backward = (fake_quantize_backward, grad, w, rule, group_size)
        exact, close = partial(exact_error, device=device), partial(close_error, device=device)
        yield Check(
            f"quantize_levels, {rule}", dtype, partial(exact, quantize_levels, w, rule, group_size)
        )
        yield Check(f"fake_quantize, {rule}", dtype, partial(exact, *forward))
        yield Check(f"fake_quantize_backward, {rule}", dtype, partial(close, *backward))
    call = (quantize_levels, w, "optimal", 64, importance)
    yield Check("quantize_levels, importance", dtype, partial(importance_error, call, device))
    for group_size in GROUPS:
        scales, biases = torch.randn(2, 33, 384 // group_size)
        affine = (w, scales, biases, group_size)
        call = partial(exact_error, fake_quantize_affine, *affine, device=device)
        yield Check(f"fake_quantize_affine, {group_size}", dtype, call)
        call = partial(close_error, fake_quantize_affine_backward, grad, *affine, device=device)
        yield Check(f"fake_quantize_affine_backward, {group_size}", dtype, call)


def importance_error(call: tuple, device: str) -> tuple[float, float]:
    """Levels that differ: sums of products may round otherwise, which moves few cuts."""
    op, *arguments = call
    expected = op(*arguments)
    packed, scales, _ = on_gpu(device, op, tuple(arguments), expected)
    tolerance = 8 * torch.finfo(scales.dtype).eps
    far = (scales.cpu().float() - expected[1].float()).abs() > tolerance * expected[1].float().abs()
    return float(far.float().mean() + differences(packed, expected[0]) / packed.numel()), 0.02


def flip_bits_error(device: str) -> tuple[float, float]:
    """A block of coordinate descent: the CPU's bits."""
    x, error = torch.randn(200, 256), torch.randn(33, 256)
    moments, scales, bits = x.T @ x / 200, torch.rand(33, 4), torch.rand(33, 256) > 0.5
    # a tie, unless a product is fused with the sum it is in
    moments[64, 64] = moments[65, 65] = 1
    moments[64, 65], scales[0], bits[0, 64:66] = 1 + 2.0**-23, 3.0, False
    error[0, 64], error[0, 65] = 10, 4.5 + 2.0**-21
    moved = [t.to(device, copy=True) for t in (bits, error, scales, moments)]
    for arguments in ((bits, error, scales, moments), moved):
        torch.ops.onebit.flip_bits_(*arguments, 64, 192, 64)
    return float((moved[0].cpu() != bits).sum()), 0


def affine_grad_error(
    group_size: int, transpose: bool, dtype: torch.dtype, device: str
) -> tuple[float, float]:
    packed, *_ = make_weights(71, 384, dtype, group_size)
    k, n = (384, 71) if transpose else (71, 384)
    x, grad = torch.randn(40, k).to(dtype), torch.randn(40, n).to(dtype)
    rest = (packed, None, None, group_size, transpose)
    exact = torch.ops.onebit.affine_grad(grad.double(), x.double(), *rest)
    like = tuple(t.float() for t in exact)
    ours = on_gpu(device, torch.ops.onebit.affine_grad, (grad, x, *rest), like)
    return max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)), 1e-6


# What a call may look like. Of x [2, 3, 256] and three matrices [40, 256] in groups of 64.
CALLS: dict[str, Callable[..., Tensor]] = {
    "storage offsets": lambda x, *w: torch_onebit.qmm(x[1], *(t[1] for t in w), 64),
    "x not aligned": lambda x, *w: torch_onebit.qmm(
        x.flatten()[3 : 3 + 512].view(2, 256), *(t[2] for t in w), 64
    ),
    "x of three dimensions": lambda x, *w: torch_onebit.qmm(x, *(t[0] for t in w), 64),
    "rows of x swapped": lambda x, *w: torch_onebit.qmm(x.transpose(0, 1), *(t[0] for t in w), 64),
    "columns of x apart": lambda x, *w: torch_onebit.qmm(
        x.repeat_interleave(2, -1)[..., ::2], *(t[0] for t in w), 64
    ),
    "words of uint32": lambda x, words, *levels: torch_onebit.qmm(
        x[0], words[0].view(torch.uint32), *(t[0] for t in levels), 64
    ),
    "a matrix for each batch": lambda x, *w: torch.ops.onebit.gather_qmm(
        x, *w, None, torch.tensor([2, 0], device=x.device), 64
    ),
    "matrices of x and w": lambda x, *w: torch.ops.onebit.gather_qmm(
        x,
        *w,
        torch.tensor([1, 0, 1], device=x.device),
        torch.tensor([2, 0, 1], device=x.device),
        64,
    ),
}


def call_error(name: str, dtype: torch.dtype, device: str) -> tuple[float, float]:
    weights = [t.view(3, 40, -1) for t in make_weights(120, 256, dtype, 64)]
    x = torch.randn(2, 3, 256).to(dtype)
    exact = CALLS[name](x.double(), *weights)
    y = on_gpu(device, CALLS[name], (x, *weights), exact.to(dtype))
    return relative_error(y, exact), 2 * torch.finfo(dtype).eps


def autocast_error(device: str) -> tuple[float, float]:
    x, weights = torch.randn(5, 256), make_weights(40, 256, torch.float32, 64)
    exact = torch_onebit.qmm(x.half().double(), *weights, 64)
    with torch.autocast(device, dtype=torch.float16):
        y = on_gpu(device, torch_onebit.qmm, (x, *weights, 64), exact.half())
    wrong = 0.0 if y.dtype == torch.float16 else 1.0
    return relative_error(y, exact) + wrong, 2 * torch.finfo(torch.float16).eps


def training_error(device: str) -> tuple[float, float]:
    """The gradients of x, scales and biases."""
    x, (packed, *levels) = torch.randn(6, 256), make_weights(40, 256, torch.float32, 64)
    gradients = []
    for where in ("cpu", device):
        leaves = [t.detach().to(where).requires_grad_() for t in (x, *levels)]
        y = torch_onebit.qmm(leaves[0], packed.to(where), *leaves[1:], 64)
        y.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    pairs = zip(*gradients, strict=True)
    return max(relative_error(b, a.double()) for a, b in pairs), 1e-5


def checks(device: str) -> Iterator[Check]:
    """Every check, in the order of the table. Uses torch's random numbers."""
    for dtype in DTYPES:
        yield from codec_checks(dtype, device)
        yield from level_checks(dtype, device)
        for group_size in GROUPS:
            for transpose in (True, False):
                name = f"affine_grad, {group_size}{'' if transpose else ', not transposed'}"
                call = partial(affine_grad_error, group_size, transpose, dtype, device)
                yield Check(name, dtype, call)
            for kernel in sorted_kernels(dtype, device):
                forced = kernel if device == "mps" else ""
                call = partial(gather_error, 4, True, group_size, dtype, device, forced)
                yield Check(f"{kernel}, {group_size}", dtype, call)
        call = partial(gather_error, 4, False, 32, dtype, device)
        yield Check("gather, not sorted", dtype, call)
        for name in CALLS:
            yield Check(f"call: {name}", dtype, partial(call_error, name, dtype, device))
    for case, dtype in variants(products(device)):
        yield Check(case.kernel, dtype, partial(product_error, case, dtype, device))
    yield Check("flip_bits", torch.float32, partial(flip_bits_error, device))
    yield Check("call: autocast", torch.float16, partial(autocast_error, device))
    yield Check("call: training", torch.float32, partial(training_error, device))
