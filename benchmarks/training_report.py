"""Tables, bars and plots of bench_training.py, and the figures in the documentation."""

import json
from pathlib import Path
from statistics import mean

import pages

# protocol, variant, the variant it is held against, nats allowed between them
BARS = [
    ("short", "PTQ calibrated", "float32", 0.20),
    ("short", "calibrated, QAT learnable", "float32, equally long", 0.09),
    ("short", "calibrated, QAT learnable, distilled", "float32, equally long", 0.07),
    ("short", "calibrated, levels + LoRA 8", "float32, equally long", 0.09),
    ("long", "PTQ calibrated", "float32", 0.22),
]
MAX_CONVERSION_CHANGE = 0.002
FLOAT32 = "float32, equally long"


def load(protocol: str, results: Path) -> list[dict]:
    """The JSON of every seed there is."""
    return [json.loads(p.read_text()) for p in sorted(results.glob(f"training_{protocol}_seed*"))]


def loss(run: dict, variant: str) -> float | None:
    return run["variants"][variant]["loss"] if variant in run["variants"] else None


def over(runs: list[dict], variant: str, base: str) -> list[float]:
    """Loss of a variant minus that of its base, for every seed that has both."""
    pairs = [(loss(run, variant), loss(run, base)) for run in runs]
    return [a - b for a, b in pairs if a is not None and b is not None]


def _base(variant: str) -> str:
    """The float32 model that a variant is held against: trained as long."""
    untrained = variant.startswith("PTQ") or variant == "float32"
    return "float32" if untrained else FLOAT32


def table(runs: list[dict]) -> str:
    """Markdown: a row per variant; losses in nats per byte. A seed not run yet leaves its cell."""
    seeds = [f"seed {run['seed']}" for run in runs]
    header = ["", *seeds, "over float32", "trained", "seconds"]
    rows = []
    names = list(dict.fromkeys(name for run in runs for name in run["variants"]))
    for variant in names:
        difference = over(runs, variant, _base(variant))
        each = [run["variants"][variant] for run in runs if variant in run["variants"]]
        values = [loss(run, variant) for run in runs]
        cells = [
            variant,
            *["" if v is None else f"{v:.3f}" for v in values],
            f"{mean(difference):+.3f}" if difference else "",
            f"{each[0]['trained'] / 1000:,.0f} k" if each[0]["trained"] else "",
            f"{mean(r['seconds'] for r in each):.0f}",
        ]
        rows.append(cells)
    return pages.table(header, rows)


def bars(protocol: str, runs: list[dict]) -> list[tuple[str, float, float]]:
    """(what, measured, allowed) in nats, of the bars whose figures are there."""
    found = []
    for bar_protocol, variant, base, allowed in BARS:
        difference = over(runs, variant, base) if bar_protocol == protocol else []
        if difference:
            what = f"{variant} over {base} ({len(difference)} of {len(runs)} seeds)"
            found.append((what, mean(difference), allowed))
    results = [result for run in runs for result in run["variants"].values()]
    changes = [abs(r["converted"] - r["loss"]) for r in results if r["converted"] is not None]
    if changes:
        found.append(("packing changes the loss by, at most", max(changes), MAX_CONVERSION_CHANGE))
    return found


def bar_table(found: list[tuple[str, float, float]]) -> str:
    rows = [
        [what, f"{measured:.4f}", str(allowed), "met" if measured <= allowed else "MISSED"]
        for what, measured, allowed in found
    ]
    return pages.table(["bar (nats)", "measured", "allowed", ""], rows)


# Variants of the picture, from the cheapest to the dearest, with their colour.
SHOWN = {
    "PTQ optimal": "#d9d9d9",
    "PTQ calibrated": "#bcbddc",
    "QAT mean": "#fdae6b",
    "QAT mean, distilled": "#e6550d",
    "calibrated, levels + LoRA 8": "#a1d99b",
    "calibrated, levels + LoRA 8, distilled": "#31a354",
    "calibrated, QAT learnable": "#9ecae1",
    "calibrated, QAT learnable, distilled": "#3182bd",
}


def plot(protocol: str, runs: list[dict], path: Path) -> None:
    """What 1 bit costs by each method, means over the seeds; below, how the first seed trained."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in SHOWN if over(runs, name, _base(name))]
    figure = pyplot.figure(figsize=(11, 8))
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.1), hspace=0.4, wspace=0.25)
    bars, plain = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, 0])
    distilled = figure.add_subplot(grid[1, 1])
    costs = [mean(over(runs, name, _base(name))) for name in names]
    drawn = bars.barh(names, costs, color=[SHOWN[name] for name in names])
    bars.bar_label(drawn, [f"{cost:.2f}" for cost in costs], padding=3)
    bars.invert_yaxis()
    bars.set_xlabel("nats per byte above float32, trained as long: shorter is better")
    seeds = "1 seed" if len(runs) == 1 else f"mean of {len(runs)} seeds"
    bars.set_title(f"What one bit per weight costs, by method ({protocol} protocol, {seeds})")
    plain.plot(*_smooth(runs[0], FLOAT32), color="black", label="float32")
    for name in names:
        if runs[0]["variants"][name]["curve"]:
            axes = distilled if "distilled" in name else plain
            axes.plot(*_smooth(runs[0], name), color=SHOWN[name], label=name.split(", dist")[0])
    plain.set_ylim(top=2.2)
    plain.set_title("Trained on text: loss, nats per byte", fontsize=10)
    distilled.set_title("Distilled: half of that, half distance to the teacher", fontsize=10)
    for axes in (plain, distilled):
        axes.set_xlabel("steps from the float32 model")
        axes.legend(loc="upper right", frameon=False)
    for axes in (bars, plain, distilled):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def _smooth(run: dict, variant: str, steps: int = 20) -> tuple[range, list[float]]:
    """The training loss, a running mean."""
    curve = run["variants"][variant]["curve"]
    return range(len(curve)), [mean(curve[max(0, i - steps) : i + 1]) for i in range(len(curve))]


# column of the README's table, variant
SUMMARY = [
    ("min/max", "PTQ minmax"),
    ("sign", "PTQ sign"),
    ("optimal", "PTQ optimal"),
    ("calibrated", "PTQ calibrated"),
    ("calibrated + LoRA", "PTQ calibrated + LoRA 8"),
    ("and levels + LoRA trained", "calibrated, levels + LoRA 8"),
    ("calibrated, then 1-bit training", "calibrated, QAT learnable"),
    ("and distilled", "calibrated, QAT learnable, distilled"),
]


def summary(runs: list[dict]) -> str:
    """One row for the README: nats above float32, means over the seeds."""
    cells = []
    for _, variant in SUMMARY:
        difference = over(runs, variant, _base(variant))
        partial = f" ({len(difference)} seeds)" if len(difference) < len(runs) else ""
        cells.append(f"{mean(difference):.2f}{partial}" if difference else "")
    return pages.table([name for name, _ in SUMMARY], [cells])


def write(protocol: str, results: Path, root: Path) -> bool:
    """Print the tables, refresh the pages, draw the curves. Returns whether every bar was met."""
    runs = load(protocol, results)
    if not runs:
        print("no results yet")
        return False
    found = bars(protocol, runs)
    text = f"{table(runs)}\n\n{bar_table(found)}"
    print(text)
    pages.put(root / "docs" / "which_method.md", protocol, text)
    if protocol == "short":
        pages.put(root / "README.md", "training", summary(runs))
    try:
        plot(protocol, runs, results / f"training_{protocol}.png")
    except ImportError:
        print("no plot: matplotlib is not installed")
    return all(measured <= allowed for _, measured, allowed in found)
