"""How fast the products of a real layer are."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import torch_onebit
from torch_onebit.selftest.cases import make_weights

SIZE = 4096  # rows and columns of the matrices
# Weights that were read just before are still in the system-level cache: matrices take turns.
TURN_BYTES = 256 << 20


@dataclass
class Speed:
    m: int
    transpose: bool
    kernel: str  # "" for the one that the rules choose
    dtype: torch.dtype
    size: int  # rows and columns of w
    microseconds: float
    bytes: int  # everything the product must read and write once

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.microseconds / 1e3

    def __str__(self) -> str:
        name = f"{'x . w^T' if self.transpose else 'x . w'}, {self.m} rows"
        name += f", {self.kernel}" if self.kernel else ""
        dtype = str(self.dtype).removeprefix("torch.")
        rate = f"{self.microseconds:9.1f} us {self.gigabytes_per_second:8.1f} GB/s"
        return f"{name:<32} {dtype:<9} {rate}"


def speed(
    m: int, transpose: bool, device: str, *, kernel: str = "", dtype=torch.float16, seconds=0.3
) -> Speed:
    weights = make_weights(SIZE, SIZE, dtype, 128)
    size = sum(t.nbytes for t in weights)
    turns = [[t.to(device) for t in weights] for _ in range(-(-TURN_BYTES // size))]
    x = torch.randn(m, SIZE).to(dtype).to(device)
    synchronize = getattr(torch, device).synchronize

    def run(count: int) -> float:
        synchronize()
        start = time.perf_counter()
        for i in range(count):
            torch_onebit.qmm(x, *turns[i % len(turns)], 128, transpose)
        synchronize()
        return time.perf_counter() - start

    run(len(turns))  # compiles, and warms up
    count = len(turns)
    while (elapsed := run(count)) < seconds:
        count *= 2
    return Speed(m, transpose, kernel, dtype, SIZE, elapsed / count * 1e6, size + 2 * x.nbytes)


def speeds(device: str) -> Iterator[Speed]:
    for transpose, m in [
        (True, 1),
        (True, 4),
        (True, 8),
        (True, 32),
        (True, 512),
        (False, 1),
        (False, 32),
    ]:
        yield speed(m, transpose, device)
