"""Results as a table to paste, as JSON, and as two charts."""

import json
from pathlib import Path

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


def draw_charts(results: Results, folder: Path) -> list[Path]:
    """A bar chart and a roofline of the batch suite. Needs matplotlib (``torch_onebit[plots]``)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    rows = next(rows for title, rows in results["suites"].items() if title.startswith("Batches"))
    sizes = sorted({int(row["case"].rsplit("=", 1)[1]) for row in rows})
    names = list(dict.fromkeys(row["name"] for row in rows if "scalar" not in row["name"]))
    rate = {(row["name"], int(row["case"].rsplit("=", 1)[1])): row["GMAC/s"] for row in rows}
    limits = results["limits"]
    peak, read = limits["macs_per_second"] / 1e9, limits["read_bytes_per_second"]

    figure, axes = pyplot.subplots(figsize=(11, 4.5))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        values = [rate.get((name, m), 0) for m in sizes]
        positions = [j + (i - len(names) / 2) * width for j in range(len(sizes))]
        axes.bar(positions, values, width, label=name)
    axes.axhline(peak, color="black", linewidth=1, linestyle="--", label="float32 FMA peak")
    axes.set_xticks(range(len(sizes)), [f"m={m}" for m in sizes])
    axes.set_ylabel("GMAC/s")
    axes.set_title(f"x[m, 4096] @ w[4096, 4096].T, {results['machine']['cpu']}")
    axes.legend(fontsize=8)
    bars = folder / "bench_bars.png"
    figure.tight_layout()
    figure.savefig(bars, dpi=120)

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    bits = {"onebit f32": 1.25, "onebit bf16": 1.25, "F.linear f32": 32, "F.linear bf16": 16}
    intensities = [2**i for i in range(-3, 14)]
    axes.plot(
        intensities,
        [min(peak, read * i / 1e9) for i in intensities],
        color="black",
        label="limit of float32 FMA and memory",
    )
    for name, weight_bits in bits.items():
        points = [(m * 8 / weight_bits, rate[name, m]) for m in sizes if (name, m) in rate]
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("multiply-adds per byte of weights")
    axes.set_ylabel("GMAC/s")
    axes.legend(fontsize=8)
    roofline = folder / "bench_roofline.png"
    figure.tight_layout()
    figure.savefig(roofline, dpi=120)
    return [bars, roofline]
