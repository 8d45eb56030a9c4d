"""Mixed calls from eight threads while the number of OpenMP threads changes: `--seconds 60`.

Results must stay what they were, bit for bit, and memory flat to one percent.
"""

import argparse
import ctypes
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
from helpers import make_weights
from torch import Tensor

from torch_onebit import OneBitLinear

ops = torch.ops.onebit
THREADS = 8
MOST_OPENMP_THREADS = 4
PARTS = 25  # of the time; between two the threads rest
GROWTH = 0.01  # of memory, from the second fifth of the time to the last

Call = Callable[[], Tensor | Iterable[Tensor]]


def calls() -> dict[str, Call]:
    """Calls large enough to be split among threads, and small ones, of every kind of kernel."""
    made: dict[str, Call] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        packed, scales, biases = make_weights(1024, 2048, group_size=32, dtype=torch.float16)
        for rows in (1, 4, 33):
            x = torch.randn(rows, 2048).to(dtype)
            made[f"qmm {rows} {dtype}"] = lambda x=x, p=packed, s=scales, b=biases: ops.qmm(
                x, p, s, b, 32
            )
        x = torch.randn(33, 1024).to(dtype)
        made[f"qmm transposed {dtype}"] = lambda x=x, p=packed, s=scales, b=biases: ops.qmm(
            x, p, s, b, 32, False
        )
        grad, x = torch.randn(64, 1024).to(dtype), torch.randn(64, 2048).to(dtype)
        made[f"affine_grad {dtype}"] = lambda g=grad, x=x, p=packed: ops.affine_grad(
            g, x, p, None, None, 32
        )
        w = torch.randn(1024, 1024).to(dtype)
        made[f"quantize {dtype}"] = lambda w=w: ops.quantize(w, 64)
        made[f"quantize_levels {dtype}"] = lambda w=w: ops.quantize_levels(w, "optimal", 64)
        made[f"fake_quantize {dtype}"] = lambda w=w: ops.fake_quantize(w, "mean", 128)
        made[f"fake_quantize_backward {dtype}"] = lambda w=w: ops.fake_quantize_backward(
            w, w, "mean", 128
        )
    packed, scales, biases = make_weights(6, 256, 512, group_size=128)
    rhs, x = torch.randint(0, 6, (50,)), torch.randn(50, 3, 512)
    made["gather_qmm"] = lambda: ops.gather_qmm(x, packed, scales, biases, None, rhs, 128)
    indices = torch.randint(0, 256, (2000,))
    made["embedding"] = lambda: ops.embedding(indices, packed[0], scales[0], biases[0], 128)
    made["dequantize"] = lambda: ops.dequantize(packed, scales, biases, 128)
    layer = OneBitLinear(512, 640)
    if ops.can_prepack():
        layer.prepack()
    row = torch.randn(2, 512)
    made["OneBitLinear"] = lambda: layer(row).detach()
    trained = OneBitLinear(512, 256).requires_grad_()
    made["gradients"] = lambda: torch.autograd.grad(trained(x[0]).sum(), trained.parameters())
    return made


def as_list(result: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def resident_bytes() -> int:
    """With what malloc keeps for later given back."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(seconds: float, seed: int) -> int:
    torch.manual_seed(seed)
    mixed = calls()
    expected = {name: as_list(call()) for name, call in mixed.items()}
    counts, wrong, memory = [0] * THREADS, [], []
    start = time.monotonic()
    # Memory is read while nobody holds a result.
    rest = threading.Barrier(THREADS, action=lambda: memory.append(resident_bytes()))

    def work(index: int) -> None:
        choose = random.Random(seed * THREADS + index)
        for part in range(1, PARTS + 1):
            while time.monotonic() < start + seconds * part / PARTS and not wrong:
                torch.set_num_threads(choose.randint(1, MOST_OPENMP_THREADS))
                for _ in range(5):
                    name = choose.choice(list(mixed))
                    try:
                        if not all(map(torch.equal, as_list(mixed[name]()), expected[name])):
                            wrong.append(f"{name}: another result")
                    except RuntimeError as error:  # would leave the others waiting
                        wrong.append(f"{name}: {error}")
                    counts[index] += 1
            rest.wait()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    fifth = PARTS // 5
    early, late = median(memory[fifth : 2 * fifth]), median(memory[-fifth:])
    growth = late / early - 1
    print(f"{sum(counts):,} calls on {THREADS} threads, memory {early / 1e6:.0f} MB {growth:+.2%}")
    for what in wrong:
        print(what)
    if growth > GROWTH:
        print(f"memory must grow by at most {GROWTH:.0%}, got {growth:.2%}")
    return bool(wrong) or growth > GROWTH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return soak(options.seconds, options.seed)


if __name__ == "__main__":
    sys.exit(main())
