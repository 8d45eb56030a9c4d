"""Seconds and quality of calibrate_ on a pretrained model, before and after a change.

    python benchmarks/bench_calibration.py                    # this checkout
    python benchmarks/bench_calibration.py --against CHECKOUT  # and another one, built, by turns

The model and the sequences are those of examples/demo.py, which are downloaded at first; default
options, the encoder's 48 linear layers. Each run is a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEQUENCES = 64


def measure(checkout: Path, packages: Path, threads: int) -> None:
    """One run, in this process; prints a line of JSON."""
    sys.path[:0] = [str(checkout), str(ROOT / "examples")]
    import antibody
    import torch

    import torch_onebit

    assert Path(torch_onebit.__file__).is_relative_to(checkout), torch_onebit.__file__
    torch.set_num_threads(threads)
    model = antibody.load_model(packages)
    training, held_out = antibody.load_sequences(packages)
    masking = antibody.Masking(packages)
    batches = [inputs for inputs, _ in masking.batches(training[:SEQUENCES], 16, seed=1)]
    wall, cpu = time.perf_counter(), time.process_time()
    torch_onebit.calibrate_(
        model,
        batches,
        group_size=128,
        filter_fn=lambda _, name: name.startswith("bert.encoder."),
        progress=False,
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tests = [batch for seed in range(3) for batch in masking.batches(held_out, 16, seed)]
    loss, right, _ = antibody.evaluate(model, tests)
    print(json.dumps({"wall": wall, "cpu": cpu, "loss": loss, "right": right}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", type=Path)
    parser.add_argument("--packages", type=Path, default=Path("out/packages"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    packages = args.packages.resolve()
    if args.measure:
        return measure(args.measure, packages, args.threads)
    sys.path[:0] = [str(ROOT / "examples")]
    import antibody

    packages.mkdir(parents=True, exist_ok=True)
    if not antibody.download(packages):
        sys.exit("the packages cannot be had")
    checkouts = [path.resolve() for path in (args.against, ROOT) if path]
    found: dict[Path, list[dict]] = {path: [] for path in checkouts}
    for _ in range(args.runs):
        for path in checkouts:
            command = [sys.executable, __file__, "--measure", str(path)]
            command += ["--packages", str(packages), "--threads", str(args.threads)]
            result = subprocess.run(command, cwd=path, capture_output=True, text=True, check=True)
            found[path].append(json.loads(result.stdout.splitlines()[-1]))
    print(f"\n| calibrate_, {args.threads} thread(s) | CPU s | wall s | loss | guessed right |")
    print("|---|---|---|---|---|")
    for path, runs in found.items():
        cpu, wall = (statistics.median(run[name] for run in runs) for name in ("cpu", "wall"))
        loss, right = runs[0]["loss"], runs[0]["right"]
        print(f"| {path.name} | {cpu:.1f} | {wall:.1f} | {loss:.4f} | {right:.2%} |")
    if args.against:
        ratios = [
            a["cpu"] / b["cpu"] for a, b in zip(*(found[path] for path in checkouts), strict=True)
        ]
        print(f"\n{statistics.median(ratios):.2f} times as fast")


if __name__ == "__main__":
    main()
