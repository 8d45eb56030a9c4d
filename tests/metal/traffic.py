"""What a product reads and what keeps it waiting, counted by the emulator."""

import math
import os
from collections import Counter
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


Launch = tuple[str, tuple[int, int], dict[int, tuple[int, int]]]


def launches(call) -> list[Launch]:
    """Of each launch: kernel, cycles of banks and the least, bytes read and missed by buffer."""
    torch.ops.onebit_fake.take_log()
    os.environ["ONEBIT_FAKE_TRAFFIC"] = "1"
    try:
        call()
    finally:
        del os.environ["ONEBIT_FAKE_TRAFFIC"]
    found = []
    for line in torch.ops.onebit_fake.take_log().splitlines():
        if line == "commit":
            continue
        kernel, _, _, *counts = line.split()
        pairs = {name: (int(a), int(b)) for name, a, b in (c.split(":") for c in counts)}
        banks = pairs.pop("banks")
        found.append((kernel, banks, {int(i): n for i, n in pairs.items()}))
    return found


def measure(m: int, n: int, k: int, *, group_size: int = 128, transpose: bool = True) -> Traffic:
    """One float16 product on the emulated GPU."""
    rows, columns = (n, k) if transpose else (k, n)
    packed, scales, biases = make_weights(
        rows, columns, group_size=group_size, dtype=torch.float16, device="mps"
    )
    x = torch.randn(m, k).half().to("mps")
    found = launches(lambda: torch.ops.onebit.qmm(x, packed, scales, biases, group_size, transpose))
    # the tiles that are tried at a first use come before, the sum of partial ones after
    kernel, (cycles, least), by_index = [f for f in found if not f[0].startswith("sum_partials")][
        -1
    ]
    tensors = {"x": x, "packed": packed, "scales": scales, "biases": biases}
    return Traffic(
        kernel,
        {name: by_index[i][0] for name, i in BUFFERS.items()},
        {name: t.numel() * t.element_size() for name, t in tensors.items()},
        m * n * k * x.element_size(),
        {name: by_index[i][1] for name, i in BUFFERS.items()},
        cycles / max(least, 1),
    )


def passes(m: int, transpose: bool) -> int:
    """Times that the rows of x, in tiles of 64 or of 32, force a pass over w."""
    return math.ceil(m / (64 if transpose else 32))


# Outputs and inputs of the linear layers of one block of Qwen3-0.6B, which has 28.
BLOCKS, BLOCK = (
    28,
    [
        *((2048, 1024), (1024, 1024), (1024, 1024), (1024, 2048)),
        *((3072, 1024), (3072, 1024), (1024, 3072)),
    ],
)


@dataclass
class Block:
    """What the packed layers of one block do for `rows` tokens at once."""

    kernels: dict[str, int]
    helpers: int  # operations of PyTorch that our operators launch besides
    read: dict[str, int]
    missed: dict[str, int]
    bank_cycles: int
    bank_least: int


def block(rows: int) -> Block:
    """Counts one block in float16, with x of three dimensions as a model has it."""
    layers = []
    for n, k in BLOCK:
        weights = make_weights(n, k, group_size=128, dtype=torch.float16, device="mps")
        layers.append((torch.randn(1, rows, k).half().to("mps"), weights))
    for x, w in layers:  # tries tensor operations where there are some
        torch.ops.onebit.qmm(x[:, :, :], *w, 128)
    torch.ops.onebit_fake.take_helpers()
    found = launches(lambda: [torch.ops.onebit.qmm(x, *w, 128) for x, w in layers])
    read, missed = Counter(), Counter()
    for kernel, _, by_index in found:
        for name, i in BUFFERS.items():
            if not kernel.startswith("sum_partials"):
                read[name] += by_index[i][0]
                missed[name] += by_index[i][1]
    return Block(
        dict(Counter(kernel for kernel, *_ in found)),
        torch.ops.onebit_fake.take_helpers(),
        dict(read),
        dict(missed),
        sum(banks[0] for _, banks, _ in found),
        sum(banks[1] for _, banks, _ in found),
    )
