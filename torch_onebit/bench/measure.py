"""Timing: everything that is compared runs interleaved, round by round, in one process."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

# Seconds of one sample; a call shorter than this is repeated.
SAMPLE_SECONDS = 0.03


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
            samples[name].append(_seconds(call, repeats[name]))
    return {name: Timing(values) for name, values in samples.items()}


def _seconds(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats
