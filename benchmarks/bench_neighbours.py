"""Products on cores that other processes keep busy, in the default environment.

python benchmarks/bench_neighbours.py    # half a minute, on an otherwise quiet machine
"""

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

import pages
import torch
import torch.nn.functional as F

from torch_onebit.bench.peers import Weights, ours, prepacked

SECONDS = 0.5  # of a sample: a hundred time slices


def busy(cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    while True:
        pass


@contextmanager
def neighbours(places: list[set[int]]):
    """A process that never sleeps for each of these sets of cores."""
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=busy, args=(cores,), daemon=True) for cores in places]
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
    cores = os.sched_getaffinity(0)
    alone = rounds(calls, 3)
    with neighbours([cores]):
        one = rounds(calls, 3)
    with neighbours([{core} for core in cores]):
        each = rounds(calls, 3)
    header = ["", "alone, us", "one, us", "of `F.linear`", "one on each core, us", "of `F.linear`"]
    peers = [times["`F.linear` bfloat16"] for times in (one, each)]
    body = []
    for name in calls:
        cells = [f"{alone[name] * 1e6:.0f}"]
        for times, peer in zip((one, each), peers, strict=True):
            cells += [f"{times[name] * 1e6:.0f}", f"1/{peer / times[name]:.0f}"]
        body.append([name, *cells])
    print(pages.table(header, body))


if __name__ == "__main__":
    main()
