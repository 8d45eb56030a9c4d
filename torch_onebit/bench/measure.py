"""Timing: everything that is compared runs interleaved, round by round, in one process."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# Seconds of one sample; a call shorter than this is repeated.
SAMPLE_SECONDS = 0.03
# Multiply-adds per thread, two milliseconds.
SPIN_STEPS = 1 << 20
# Slowdowns seen: one thread with a core to itself 1.05 to 1.08; two threads on two cores that other
# processes kept busy 3 to 5.
QUIET = 1.15
# Spins whose CPU time is taken together: the kernel books that of a running thread every few
# milliseconds only, so that one spin may seem to have had one thread's, or three threads'.
BLOCK = 25


@dataclass
class Spin:
    """A fixed piece of work on all threads between all samples: what else the machine does shows
    in it, as time that its threads waited for a core and as a spread of what it takes."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads

    def __call__(self) -> None:
        begin, cpu = time.perf_counter(), time.process_time()
        torch.ops.onebit_bench.multiply_adds(SPIN_STEPS)
        self.seconds.append(time.perf_counter() - begin)
        self.cpu_seconds.append(time.process_time() - cpu)

    @property
    def waited(self) -> list[float]:
        """Seconds of all threads per CPU second, of blocks of spins."""
        threads = torch.get_num_threads()
        starts = range(0, max(len(self.seconds) - BLOCK, 0) + 1, BLOCK)
        return [
            threads * sum(self.seconds[i : i + BLOCK]) / sum(self.cpu_seconds[i : i + BLOCK])
            for i in starts
        ]

    @property
    def slowdown(self) -> float:
        """How much longer the work usually takes than on a machine that does nothing else."""
        spread = statistics.median(self.seconds) / min(self.seconds)
        return max(spread, statistics.median(self.waited))

    def clear(self) -> None:
        self.seconds.clear()
        self.cpu_seconds.clear()


SPIN = Spin()


@dataclass
class Timing:
    """Seconds of one call, over rounds."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "min": min(self.samples), "max": max(self.samples)}


def interleave(calls: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, Timing]:
    """Time every call ``rounds`` times, in turn, after one call to warm up."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(SAMPLE_SECONDS / _seconds(call, 1)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            SPIN()
            samples[name].append(_seconds(call, repeats[name]))
    return {name: Timing(values) for name, values in samples.items()}


def time_once(call: Callable[[], object]) -> float:
    """Seconds of one call that takes long, after a spin."""
    SPIN()
    return _seconds(call, 1)


def _seconds(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats
