"""Speed of the quantization methods and of a QAT step.

    python benchmarks/bench_quantizers.py            # methods and QAT, under a minute
    python benchmarks/bench_quantizers.py --solver   # calibration of 4096-shaped layers

Medians (min - max) over interleaved repetitions, but one calibration. One thread unless --threads
says more. --write puts the tables into docs/which_method.md.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import pages  # noqa: E402
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


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: list[float], digits: int = 0) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def methods() -> str:
    """Megabytes of float32 weights per second and method."""
    w = torch.randn(1024, 4096)
    megabytes = w.numel() * 4 / 1e6
    importance = torch.rand(4096)
    calls: dict[str, Callable[[int], object]] = {
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
    rows = []
    for name, call in calls.items():
        cells = [name]
        for group_size in (32, 64, 128):
            seconds = interleaved({name: lambda g=group_size, c=call: c(g)}, 5)[name]
            cells.append(spread([megabytes / s for s in seconds]))
        rows.append(cells)
    return pages.table(["MB of float32 per second", "group 32", "64", "128"], rows)


def qat_step(repetitions: int = 15) -> str:
    """A training step of the demo's model in float32 and with 1-bit weights, by turns."""
    tokens = torch.randint(256, (16, 128))

    def stepper(rule: str | None) -> Callable[[], None]:
        torch.manual_seed(0)
        model = ByteLM(Config())
        if rule:
            torch_onebit.prepare_qat_(model, method=rule, group_size=64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            cross_entropy(model(tokens), tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    rules = [None, "mean", "sign", "optimal", "learnable"]
    seconds = interleaved({str(rule): stepper(rule) for rule in rules}, repetitions)
    base = statistics.median(seconds["None"])
    rows = []
    for rule in rules:
        values = [1e3 * s for s in seconds[str(rule)]]
        ratio = statistics.median(values) / (1e3 * base)
        rows.append([f"QAT {rule}" if rule else "float32", spread(values, 1), f"{ratio:.3f}"])
    return pages.table(["training step of the demo's model", "ms", "of float32"], rows)


def solver() -> str:
    """Seconds to calibrate one layer, moments given, and what the cost model says of it."""
    rows = []
    for n, k, group_size in [
        (128, 4096, 64),
        (4096, 128, 64),
        (1024, 4096, 128),
        (4096, 4096, 128),
    ]:
        x = torch.randn(1024, k) @ (torch.randn(k, k) * k**-0.5) + 0.3 * torch.randn(k)
        moments = x.t() @ x / len(x)
        w = torch.randn(n, k)
        quantize = partial(torch_onebit.quantize_weight, w, "calibrated", group_size)
        seconds = seconds_of(partial(quantize, moments=moments))
        # 3 rounds of: a refit (n k^2, halved by symmetry, and its solves), an error (n k^2); a last
        # refit. Flips of bits come on top.
        flops = 2 * n * k * k * 5 + 4 * 2 / 3 * n * (2 * k / group_size) ** 3
        gflop = flops / 1e9
        speed = f"{gflop / seconds:.0f}"
        rows.append([f"{n} x {k}", str(group_size), f"{seconds:.1f}", f"{gflop:.0f}", speed])
    header = ["calibration of one layer", "group", "seconds", "Gflop of the cost model", "Gflop/s"]
    return pages.table(header, rows)


def passes() -> str:
    """calibrate_, one round of the solver: running block by block, and always from the start."""
    calibrate = partial(
        torch_onebit.calibrate_,
        batches=[torch.randint(256, (16, 64)) for _ in range(8)],
        group_size=64,
        options=torch_onebit.CalibrationOptions(rounds=1),
        progress=False,
    )
    rows = []
    for layers in (4, 16):
        torch.manual_seed(0)
        model = ByteLM(Config(128, layers, 4, 64))
        one_at_a_time = seconds_of(lambda m=model: calibrate(copy.deepcopy(m)))
        with mock.patch("torch_onebit.calibration.survey.is_chain", return_value=False):
            from_start = seconds_of(lambda m=model: calibrate(copy.deepcopy(m)))
        rows.append([f"{layers} blocks of width 128", f"{one_at_a_time:.1f}", f"{from_start:.1f}"])
    return pages.table(["calibrate_, 1 round", "seconds", "always from the start"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--solver", action="store_true")
    parser.add_argument("--write", action="store_true", help="into docs/which_method.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = f"torch {torch.__version__}, {args.threads} thread(s), {ops.cpu_isa()}:"
    tables = [solver(), passes()] if args.solver else [methods(), qat_step()]
    text = "\n\n".join([machine, *tables])
    print(text)
    if args.write:
        name = "solver" if args.solver else "speed"
        pages.put(ROOT / "docs" / "which_method.md", name, text)


if __name__ == "__main__":
    main()
