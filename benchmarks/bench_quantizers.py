"""Speed of the quantization methods and of a QAT step.

    python benchmarks/bench_quantizers.py            # methods and QAT, under a minute
    python benchmarks/bench_quantizers.py --solver   # calibration of 4096-shaped layers

Prints medians (and min - max) over interleaved repetitions, one thread unless --threads says more.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from byte_lm import ByteLM, Config, cross_entropy  # noqa: E402

import torch_onebit  # noqa: E402

ops = torch.ops.onebit


def interleaved(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every call, repeated in turns after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float], digits: int = 0) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def methods() -> None:
    w = torch.randn(1024, 4096)
    megabytes = w.numel() * 4 / 1e6
    importance = torch.rand(4096)
    print("\nMB of float32 per second | group 32 | 64 | 128")
    rows: dict[str, Callable[[int], object]] = {
        "quantize (min/max)": lambda g: ops.quantize(w, g),
        "quantize_levels sign": lambda g: ops.quantize_levels(w, "sign", g),
        "quantize_levels mean": lambda g: ops.quantize_levels(w, "mean", g),
        "quantize_levels optimal": lambda g: ops.quantize_levels(w, "optimal", g),
        "quantize_levels optimal, weighted": lambda g: ops.quantize_levels(
            w, "optimal", g, importance
        ),
        "fake_quantize mean": lambda g: ops.fake_quantize(w, "mean", g),
        "fake_quantize_backward mean": lambda g: ops.fake_quantize_backward(w, w, "mean", g),
        "fake_quantize_backward optimal": lambda g: ops.fake_quantize_backward(w, w, "optimal", g),
    }
    for name, call in rows.items():
        cells = []
        for group_size in (32, 64, 128):
            seconds = interleaved({name: lambda g=group_size, c=call: c(g)}, 5)[name]
            cells.append(spread([megabytes / s for s in seconds]))
        print(" | ".join([name, *cells]))


def qat_step(repetitions: int = 15) -> None:
    """A training step of the demo's model in float32 and with 1-bit weights, by turns."""
    tokens = torch.randint(256, (16, 128))

    def stepper(rule: str | None) -> Callable[[], None]:
        torch.manual_seed(0)
        model = ByteLM(Config())
        if rule:
            torch_onebit.prepare_qat_(model, rule=rule, group_size=64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            cross_entropy(model(tokens), tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    rules = [None, "mean", "sign", "optimal", "learnable"]
    seconds = interleaved({str(rule): stepper(rule) for rule in rules}, repetitions)
    base = statistics.median(seconds["None"])
    print("\ntraining step of the demo's model | ms | of float32")
    for rule in rules:
        values = [1e3 * s for s in seconds[str(rule)]]
        ratio = statistics.median(values) / (1e3 * base)
        print(f"{'QAT ' + rule if rule else 'float32'} | {spread(values, 1)} | {ratio:.3f}")


def solver() -> None:
    """Seconds to calibrate one layer, moments given; and the cost model's prediction."""
    print("\ncalibration of one layer | group | seconds | Gflop of the model | Gflop/s")
    for n, k, group_size in [
        (128, 4096, 64),
        (4096, 128, 64),
        (1024, 4096, 128),
        (4096, 4096, 128),
    ]:
        x = torch.randn(1024, k) @ (torch.randn(k, k) * k**-0.5) + 0.3 * torch.randn(k)
        moments = x.t() @ x / len(x)
        w = torch.randn(n, k)
        start = time.perf_counter()
        torch_onebit.quantize_weight(w, "calibrated", group_size, moments=moments)
        seconds = time.perf_counter() - start
        # 5 rounds of: a refit (n k^2, halved by symmetry, and its solves), the error (n k^2), two
        # sweeps (n k^2 each).
        flops = 5 * (2 * n * k * k * 3.5 + 2 / 3 * n * (2 * k / group_size) ** 3)
        gflop = flops / 1e9
        print(f"{n} x {k} | {group_size} | {seconds:.2f} | {gflop:.0f} | {gflop / seconds:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--solver", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} thread(s), {ops.cpu_isa()}")
    if args.solver:
        return solver()
    methods()
    qat_step()


if __name__ == "__main__":
    main()
