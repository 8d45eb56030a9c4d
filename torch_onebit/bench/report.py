"""Results as a table to paste and as JSON."""

import json
from pathlib import Path

from torch_onebit.bench.measure import QUIET

Results = dict[str, object]


def print_report(results: Results) -> None:
    machine, limits = results["machine"], results["limits"]
    print(f"\n{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    print(
        f"memory read {limits['read_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"float32 FMA peak {limits['macs_per_second'] / 1e9:.1f} GMAC/s"
    )
    for title, rows in results["suites"].items():
        print(f"\n{title}\n{markdown(rows)}")
    print(f"\n{verdict(results)}")


def verdict(results: Results) -> str:
    """Whether the machine was quiet enough to believe the figures."""
    slowdown = results.get("slowdown")
    if slowdown is None:
        return "Whether the machine was quiet was not recorded."
    measured = f"a fixed piece of work between all samples took {slowdown:.2f} times its fastest"
    if slowdown <= QUIET:
        return f"The machine was quiet: {measured}."
    return (
        f"THE MACHINE WAS BUSY: {measured} (a quiet machine: below {QUIET}). These figures are not "
        "to be trusted: run again when nothing else runs."
    )


def markdown(rows: list[dict[str, object]]) -> str:
    """One suite as a table."""
    return _table([_line(row) for row in rows])


def _line(row: dict[str, object]) -> dict[str, str]:
    shown = {}
    for key, value in row.items():
        if key in ("median", "min", "max"):
            key, value = f"{key} ms", f"{value * 1e3:.4g}"
        elif key == "error":
            value = f"{value:.1e}"
        elif key == "of_stream":
            value = f"{value:.0%}"
        elif isinstance(value, float):
            value = f"{value:.1f}"
        shown[key] = str(value)
    return shown


def _table(lines: list[dict[str, str]]) -> str:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    rows = [columns, ["---"] * len(columns)]
    rows += [[line.get(column, "") for column in columns] for line in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in padded)


def write_json(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
