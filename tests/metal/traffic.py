"""What a product reads and what keeps it waiting, counted by the emulator."""

import math
import os
from dataclasses import dataclass

import torch
from helpers import make_weights

BUFFERS = {"x": 0, "packed": 1, "scales": 2, "biases": 3}


@dataclass
class Traffic:
    kernel: str
    read: dict[str, int]  # bytes, by buffer
    minimum: dict[str, int]  # bytes of the tensors, by buffer
    naive_x: int  # every output reads its own row of x
    missed: dict[str, int]  # bytes that an L1 of 8 KB did not have, by buffer
    conflicts: float  # cycles of threadgroup memory over those without bank conflicts

    def ratio(self, buffer: str) -> float:
        return self.read[buffer] / self.minimum[buffer]


def measure(m: int, n: int, k: int, *, group_size: int = 128, transpose: bool = True) -> Traffic:
    """One float16 product on the emulated GPU."""
    rows, columns = (n, k) if transpose else (k, n)
    packed, scales, biases = make_weights(
        rows, columns, group_size=group_size, dtype=torch.float16, device="mps"
    )
    x = torch.randn(m, k).half().to("mps")
    torch.ops.onebit_fake.take_log()
    os.environ["ONEBIT_FAKE_TRAFFIC"] = "1"
    try:
        torch.ops.onebit.qmm(x, packed, scales, biases, group_size, transpose)
    finally:
        del os.environ["ONEBIT_FAKE_TRAFFIC"]
    kernel, _, _, banks, *counts = torch.ops.onebit_fake.take_log().splitlines()[0].split()
    _, cycles, least = banks.split(":")
    by_index = {int(i): (int(n), int(missed)) for i, n, missed in (c.split(":") for c in counts)}
    tensors = {"x": x, "packed": packed, "scales": scales, "biases": biases}
    return Traffic(
        kernel,
        {name: by_index[i][0] for name, i in BUFFERS.items()},
        {name: t.numel() * t.element_size() for name, t in tensors.items()},
        m * n * k * x.element_size(),
        {name: by_index[i][1] for name, i in BUFFERS.items()},
        int(cycles) / max(int(least), 1),
    )


def passes(m: int, transpose: bool) -> int:
    """Times that the rows of x, in tiles of 64 or of 32, force a pass over w."""
    return math.ceil(m / (64 if transpose else 32))
