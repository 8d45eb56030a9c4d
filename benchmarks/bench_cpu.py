"""The speed of the CPU kernels against the bars that this project set itself.

    python benchmarks/bench_cpu.py            # measure (about 6 minutes), then write the pages
    python benchmarks/bench_cpu.py --report   # only the pages, from benchmarks/results/cpu.json

Everything that is compared ran interleaved in one process (``python -m torch_onebit bench``).
Writes docs/speed.md and the table in README.md, and the charts. Exits with 1 when a bar is missed.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pages  # noqa: E402

from torch_onebit.bench import cli  # noqa: E402
from torch_onebit.bench.charts import draw_charts  # noqa: E402
from torch_onebit.bench.report import Results, markdown, verdict, write_json  # noqa: E402

SQUARE = "4096x4096"


@dataclass
class Figures:
    """Rates and times of one run, by suite, case and name."""

    results: Results

    def row(self, suite: str, case: str, name: str) -> dict[str, float]:
        rows = self.results["suites"][cli.SUITES[suite][0]]
        return next(r for r in rows if r["case"] == case and r["name"] == name)

    def rate(self, name: str, m: int) -> float:
        return self.row("batches", f"{SQUARE} m={m}", name)["GMAC/s"]

    def ratio(self, name: str, peer: str, m: int) -> float:
        return self.rate(name, m) / self.rate(peer, m)

    def of_peak(self, name: str, m: int) -> float:
        return self.rate(name, m) / (self.results["limits"]["macs_per_second"] / 1e9)

    def shape(self, case: str, beside: str) -> float:
        rates = [self.row("variants", c, "onebit f32")["GMAC/s"] for c in (case, beside)]
        return rates[0] / rates[1]

    def of_stream(self, name: str) -> float:
        return self.row("cold", f"{SQUARE} m=1 out of cache", name)["of_stream"]

    def threads(self, case: str) -> float:
        rates = [self.row("threads", case, f"{n} threads")["GMAC/s"] for n in (1, 2)]
        return rates[1] / rates[0]

    def call(self, name: str) -> float:
        return self.row("overhead", "call, 32x128 m=1", name)["median"] * 1e6

    def quantize(self) -> float:
        names = ("stream read f32", "quantize f32")
        read, quantize = (self.row("passes", SQUARE, name)["median"] for name in names)
        return read / quantize


Bar = tuple[str, float, float]  # what, measured, at least


def bars(f: Figures) -> list[Bar]:
    """Each bar is "at least"; for the overhead of a call, negative microseconds."""
    found = [
        ("m=1 / F.linear bfloat16, float32 x", f.ratio("onebit f32", "F.linear bf16", 1), 20),
        ("m=1 / F.linear bfloat16, bfloat16 x", f.ratio("onebit bf16", "F.linear bf16", 1), 20),
        ("m=1 out of cache / stream read, float32 x", f.of_stream("onebit f32"), 0.55),
        ("m=8 / torch dynamic int8", f.ratio("onebit f32", "torch dynamic int8", 8), 0.9),
        ("m=128 / F.linear float32", f.ratio("onebit f32", "F.linear f32", 128), 4.5),
        ("m=512 / F.linear float32", f.ratio("onebit f32", "F.linear f32", 512), 3.5),
        ("m=128 / float32 FMA peak", f.of_peak("onebit f32", 128), 1.8),
        ("m=512 / float32 FMA peak", f.of_peak("onebit f32", 512), 1.8),
        ("m=128, bfloat16 x / F.linear", f.ratio("onebit bf16", "F.linear bf16", 128), 2.4),
        ("m=128, bfloat16 x / int8", f.ratio("onebit bf16", "torch dynamic int8", 128), 1.3),
        ("m=1 / MLX", f.ratio("onebit f32", "mlx f32", 1), 100),
        ("14336x4096, m=1 / 4096x4096", f.shape("14336x4096, m=1", "m=1"), 0.85),
        ("4096x14336, m=1 / 4096x4096", f.shape("4096x14336, m=1", "m=1"), 0.85),
        ("14336x4096, m=128 / 4096x4096", f.shape("14336x4096, m=128", "m=128"), 0.85),
        ("4096x14336, m=128 / 4096x4096", f.shape("4096x14336, m=128", "m=128"), 0.85),
        ("n=4097 / n=4096", f.shape("n=4097, m=128", "m=128"), 0.85),
        ("k=2560 / k=4096", f.shape("k=2560, m=128", "m=128"), 0.85),
        ("k=9728 / k=4096", f.shape("k=9728, m=128", "m=128"), 0.85),
        ("k=17408 / k=4096", f.shape("k=17408, m=128", "m=128"), 0.85),
        ("m=3 / m=4", f.shape("m=3 (beside m=4)", "m=4"), 0.85),
        ("m=7 / m=8", f.shape("m=7 (beside m=8)", "m=8"), 0.85),
        ("m=33 / m=32", f.shape("m=33 (beside m=32)", "m=32"), 0.85),
        ("m=200 / m=128", f.shape("m=200 (beside m=128)", "m=128"), 0.85),
        ("group 64 / 128", f.shape("group 64, m=128", "m=128"), 0.85),
        ("group 32 / 128", f.shape("group 32, m=128", "m=128"), 0.7),
        ("transpose=False / True", f.shape("transpose=False, m=128", "m=128"), 0.6),
        ("quantize float32 / stream read", f.quantize(), 0.6),
        ("2 threads / 1, m=8", f.threads("4096x4096 m=8"), 1.85),
        ("2 threads / 1, m=128", f.threads("4096x4096 m=128"), 1.85),
        ("- us of a call of the operator", -f.call("torch.ops.onebit.qmm"), -3),
        (
            "- us that autograd adds to it",
            f.call("the same below autograd") - f.call("torch.ops.onebit.qmm"),
            -0.5,
        ),
        (
            "- us of OneBitLinear over nn.Linear",
            f.call("nn.Linear") - f.call("OneBitLinear"),
            -2,
        ),
    ]
    return found + avx2_bars(f)


def avx2_bars(f: Figures) -> list[Bar]:
    """Half of each."""
    f32, bf16 = "onebit f32 avx2", "onebit bf16 avx2"
    return [
        ("AVX2: m=1 / F.linear bfloat16", f.ratio(f32, "F.linear bf16", 1), 10),
        ("AVX2: m=8 / torch dynamic int8", f.ratio(f32, "torch dynamic int8", 8), 0.45),
        ("AVX2: m=128 / F.linear float32", f.ratio(f32, "F.linear f32", 128), 2.25),
        ("AVX2: m=512 / F.linear float32", f.ratio(f32, "F.linear f32", 512), 1.75),
        ("AVX2: m=128 / float32 FMA peak", f.of_peak(f32, 128), 0.9),
        ("AVX2: m=128, bfloat16 x / F.linear", f.ratio(bf16, "F.linear bf16", 128), 1.2),
        ("AVX2: m=128, bfloat16 x / int8", f.ratio(bf16, "torch dynamic int8", 128), 0.65),
        ("AVX2: m=1 / MLX", f.ratio(f32, "mlx f32", 1), 50),
    ]


# Columns of the table in the README.
PEERS = {
    "onebit f32": "ours, float32 x",
    "onebit bf16": "ours, bfloat16 x",
    "onebit f32 prepacked": "prepacked, float32 x",
    "onebit bf16 prepacked": "prepacked, bfloat16 x",
    "onebit f32 avx2": "AVX2, float32 x",
    "onebit bf16 avx2": "AVX2, bfloat16 x",
    "F.linear f32": "`F.linear` float32",
    "F.linear bf16": "`F.linear` bfloat16",
    "torch dynamic int8": "dynamic int8",
    "torch int4 weight-only": "int4",
    "mlx f32": "MLX",
}


def readme_table(results: Results) -> str:
    rows = results["suites"][cli.SUITES["batches"][0]]
    sizes = list(dict.fromkeys(row["case"] for row in rows))
    rate = {(row["case"], row["name"]): row["GMAC/s"] for row in rows}
    error = {row["name"]: f"{row['error']:.0e}" for row in rows}
    body = []
    for case in sizes:
        values = [rate.get((case, name)) for name in PEERS]
        shown = ["" if v is None else f"{v:.0f}" if v >= 10 else f"{v:.1f}" for v in values]
        body.append([case.rsplit("=", 1)[1], *shown])
    body.append(["error", *(error[name] for name in PEERS)])
    return pages.table(["rows of x", *PEERS.values()], body)


def write_pages(results: Results) -> bool:
    """The README's table, docs/speed.md and the charts; whether every bar was met."""
    machine, limits = results["machine"], results["limits"]
    found = bars(Figures(results))
    lines = [
        [what, f"{value:.2f}", f"{least:g}", "met" if value >= least else "MISSED"]
        for what, value, least in found
    ]
    where = (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; memory read "
        f"{limits['read_bytes_per_second'] / 1e9:.1f} GB/s, float32 FMA peak "
        f"{limits['macs_per_second'] / 1e9:.0f} GMAC/s. {verdict(results)}"
    )
    suites = [f"### {title}\n\n{markdown(rows)}" for title, rows in results["suites"].items()]
    speed = ROOT / "docs" / "speed.md"
    pages.put(speed, "bars", where + "\n\n" + pages.table(["", "measured", "bar", ""], lines))
    pages.put(speed, "suites", "\n\n".join(suites))
    pages.put(ROOT / "README.md", "speed", f"{readme_table(results)}\n\n{where}")
    draw_charts(results, ROOT / "docs" / "images")
    return all(value >= least for _, value, least in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cli.add_arguments(parser)
    parser.add_argument("--report", action="store_true", help="only the pages")
    parser.set_defaults(rounds=15)
    args = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "cpu.json"
    if not args.report:
        write_json(cli.measure(args), path)
    met = write_pages(json.loads(path.read_text()))
    print(f"written: README.md, docs/speed.md, docs/images, {path.relative_to(ROOT)}")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
