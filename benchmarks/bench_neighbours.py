"""Products on cores that other processes keep busy: one on each, in the default environment.

python benchmarks/bench_neighbours.py    # half a minute, on an otherwise quiet machine
"""

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from torch_onebit.bench.peers import Weights, ours, prepacked

SECONDS = 1.0  # of a sample: a hundred time slices


def busy(core: int) -> None:
    os.sched_setaffinity(0, {core})
    while True:
        pass


@contextmanager
def neighbours():
    """A process on every core that never sleeps."""
    spawn = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))
    others = [spawn.Process(target=busy, args=(core,), daemon=True) for core in cores]
    for other in others:
        other.start()
    time.sleep(1)
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def seconds(call: Callable[[], object]) -> float:
    """Of one call, one after the other."""
    begin, count = time.perf_counter(), 0
    while (now := time.perf_counter()) - begin < SECONDS:
        call()
        count += 1
    return (now - begin) / count


def rounds(calls: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    samples = {name: [] for name in calls}
    for _ in range(count):
        for name, call in calls.items():
            samples[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in samples.items()}


@torch.inference_mode()
def main() -> None:
    waiting = [v for v in os.environ if v.startswith(("OMP_", "GOMP_", "KMP_"))]
    if waiting:
        sys.exit(f"the environment must be the default one, got {', '.join(waiting)}")
    w = Weights.random(4096, 4096, 128)
    dense = w.dense().bfloat16()
    calls = {}
    for name, x in (
        ("float32", torch.randn(1, 4096)),
        ("bfloat16", torch.randn(1, 4096).bfloat16()),
    ):
        calls[f"row-major, {name} x"] = ours(x, w)
        if torch.ops.onebit.can_prepack():
            calls[f"prepacked, {name} x"] = prepacked(x, w)
    calls["`F.linear` bfloat16"] = lambda: F.linear(x, dense)
    for call in calls.values():
        call()
    quiet = rounds(calls, 3)
    with neighbours():
        shared = rounds(calls, 3)
    peer = shared["`F.linear` bfloat16"]
    print("| | alone, us | shared, us | over twice alone | times faster than `F.linear` |")
    print("|---|---|---|---|---|")
    for name in calls:
        row = (quiet[name] * 1e6, shared[name] * 1e6, shared[name] / quiet[name] / 2)
        print(
            f"| {name} | {row[0]:.0f} | {row[1]:.0f} | {row[2]:.2f} | {peer / shared[name]:.0f} |"
        )


if __name__ == "__main__":
    main()
