"""The arguments of ``python -m torch_onebit bench`` and what runs for them."""

import argparse
import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from torch_onebit.bench import suites
from torch_onebit.bench.charts import draw_charts
from torch_onebit.bench.limits import measure_limits
from torch_onebit.bench.measure import SPIN
from torch_onebit.bench.model import measure_model
from torch_onebit.bench.report import Results, print_report, write_json

Suites = dict[str, tuple[str, Callable[[argparse.Namespace], list[dict[str, object]]]]]

SUITES: Suites = {
    "batches": (
        "Batches: everything at 4096x4096",
        lambda a: suites.batches(4096, 4096, a.group_size, a.rounds, tuple(a.batches)),
    ),
    "cold": ("Out of cache", lambda a: suites.cold(4096, 4096, a.group_size, a.rounds)),
    "layouts": (
        "Row-major and prepacked weights",
        lambda a: suites.layouts(4096, 4096, a.group_size, a.rounds),
    ),
    "shapes": ("Projections of models", lambda a: suites.model_shapes(a.group_size, a.rounds)),
    "variants": ("Odd shapes, groups, transpose", lambda a: suites.variants(a.rounds)),
    "threads": ("Threads", lambda a: suites.threads(a.rounds)),
    "passes": ("quantize and dequantize", lambda a: suites.passes(a.rounds)),
    "overhead": ("Overhead of a call", lambda a: suites.overhead(a.rounds)),
    "model": ("Decoder of Qwen3-1.7B's shape", lambda a: measure_model()),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"of: {', '.join(SUITES)}")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each call")
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128))
    parser.add_argument("--batches", type=int, nargs="+", default=list(suites.BATCHES))
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--output", type=Path, default=Path("bench"), help="folder of the results")


def measure(arguments: argparse.Namespace) -> Results:
    """Run the chosen suites, all of them if none is named."""
    chosen = arguments.suites or list(SUITES)
    if unknown := [name for name in chosen if name not in SUITES]:
        raise SystemExit(f"suite must be one of {', '.join(SUITES)}, got {', '.join(unknown)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    SPIN.clear()
    results = {
        "machine": {
            "cpu": _cpu_name(),
            "system": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "kernels": torch.ops.onebit.cpu_isa(),
        },
        "limits": measure_limits(arguments.rounds),
        "suites": {},
    }
    with torch.inference_mode():
        for name in tqdm(chosen, desc="bench"):
            title, suite = SUITES[name]
            results["suites"][title] = suite(arguments)
    results["slowdown"] = SPIN.slowdown
    return results


def run(arguments: argparse.Namespace) -> None:
    """Measure, print a table, write JSON and, where matplotlib is installed, two charts."""
    results = measure(arguments)
    print_report(results)
    path = arguments.output / "bench.json"
    write_json(results, path)
    print(f"\nwritten: {path}")
    if SUITES["batches"][0] not in results["suites"]:
        return
    if importlib.util.find_spec("matplotlib"):
        for chart in draw_charts(results, arguments.output):
            print(f"written: {chart}")
    else:
        print("no charts: matplotlib is not installed (pip install torch_onebit[plots])")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
