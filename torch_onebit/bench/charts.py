"""Two pictures of the batch suite. They need matplotlib (``torch_onebit[plots]``)."""

from pathlib import Path

from torch_onebit.bench.report import Results

# Series of the bar chart, each with its own colour: 1 bit in blues, torch in greys and orange.
BARS = {
    "onebit bf16 prepacked": ("1 bit, bfloat16 x, prepacked", "#08306b"),
    "onebit bf16": ("1 bit, bfloat16 x", "#2171b5"),
    "onebit f32": ("1 bit, float32 x", "#6baed6"),
    "torch dynamic int8": ("torch dynamic int8", "#fdae6b"),
    "F.linear bf16": ("F.linear, bfloat16", "#737373"),
    "F.linear f32": ("F.linear, float32", "#bdbdbd"),
}
BATCHES = {1: "1 row of x\n(decoding)", 8: "8 rows", 128: "128 rows\n(reading a prompt)"}
# Lines of the roofline with the bits that a weight takes, scales and biases included.
LINES = {
    "onebit bf16": ("1 bit, bfloat16 x", 1.25, "#2171b5"),
    "onebit f32": ("1 bit, float32 x", 1.25, "#6baed6"),
    "F.linear bf16": ("F.linear, bfloat16", 16, "#737373"),
    "F.linear f32": ("F.linear, float32", 32, "#bdbdbd"),
}


def draw_charts(results: Results, folder: Path) -> list[Path]:
    """bench_cpu.png, bars, and roofline_cpu.png, into folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"bench_cpu.png": _bars, "roofline_cpu.png": _roofline}
    for name, draw in pictures.items():
        figure, axes = pyplot.subplots(figsize=(9, 4.8))
        draw(axes, results)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / name, dpi=110, bbox_inches="tight")
        pyplot.close(figure)
    return [folder / name for name in pictures]


def _rates(results: Results) -> dict[tuple[str, int], float]:
    """GMAC/s by name and rows of x."""
    rows = next(rows for title, rows in results["suites"].items() if title.startswith("Batches"))
    return {(row["name"], int(row["case"].rsplit("=", 1)[1])): row["GMAC/s"] for row in rows}


def _machine(results: Results) -> str:
    machine = results["machine"]
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['kernels']} kernels"


def _bars(axes, results: Results) -> None:
    rates = _rates(results)
    width, left = 1.0, 0.0
    ticks = {}
    for m, label in BATCHES.items():
        present = [name for name in BARS if (name, m) in rates]
        for i, name in enumerate(present):
            rate, (_, color) = rates[name, m], BARS[name]
            bar = axes.bar(left + i * width, rate, width * 0.92, color=color)
            axes.bar_label(bar, [f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"], fontsize=8)
        if present:
            ticks[left + (len(present) - 1) * width / 2] = label
            left += (len(present) + 1.2) * width
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("billion multiply-adds per second")
    axes.set_title(
        f"A product with 4096 x 4096 weights: higher is faster\n{_machine(results)}", fontsize=11
    )
    shown = [name for name in BARS if any((name, m) in rates for m in BATCHES)]
    handles = [axes.bar(0, 0, color=BARS[name][1], label=BARS[name][0]) for name in shown]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _roofline(axes, results: Results) -> None:
    rates, limits = _rates(results), results["limits"]
    peak, read = limits["macs_per_second"] / 1e9, limits["read_bytes_per_second"] / 1e9
    knee, right = peak / read, 1e4
    axes.plot([0.1, knee, right], [0.1 * read, peak, peak], color="black", linewidth=1.2)
    axes.text(right, peak * 0.93, "float32 multiply-add peak", ha="right", va="top", fontsize=8)
    axes.text(0.9, 1.3 * read, f"memory, {read:.0f} GB/s", ha="right", fontsize=8)
    for name, (label, bits, color) in LINES.items():
        points = [(m * 8 / bits, rate) for (n, m), rate in sorted(rates.items()) if n == name]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=5)
        axes.annotate(
            label,
            points[-1],
            xytext=(8, -3),
            textcoords="offset points",
            color=color if color != "#bdbdbd" else "#8c8c8c",
            fontsize=9,
            fontweight="bold",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.1, 4e4)
    axes.set_xticks([0.1, 1, 10, 100, 1000, 10000], ["0.1", "1", "10", "100", "1,000", "10,000"])
    axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axes.set_xlabel("multiply-adds per byte of weights (more to the right: more rows of x)")
    axes.set_ylabel("billion multiply-adds per second")
    axes.set_title(
        "1-bit products start where memory no longer limits, and pass the multiply-add peak:\n"
        f"sums of activations are looked up, not computed ({_machine(results)})",
        fontsize=11,
    )
