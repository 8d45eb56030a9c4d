"""Speed on an NVIDIA GPU: every product against torch's in the same dtype, and the card's limits.

``python benchmarks/bench_cuda.py`` prints the tables and writes ``benchmarks/results/cuda.json``;
``--report`` renders those of two GPUs into ``docs/cuda.md``. Times are medians of CUDA-graph
replays; the weights of products of few rows rotate out of the L2 cache, for both sides.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import torch_onebit
from torch_onebit import ops

sys.path.insert(0, str(Path(__file__).parent))
import pages

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cuda.json"
CACHE_BYTES = 160_000_000  # three times the L2 of an H100
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (12288, 4096)]
HEAD = (151936, 4096)
BF = torch.bfloat16

# A row of the tables: what was compared with what, on what.
Row = dict


def graph_us(calls, rounds: int = 15) -> float:
    """Median time of one of the calls, in microseconds, when a graph replays them all."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


class Weight:
    """Packed weights and copies of them, together larger than the cache when asked to rotate."""

    def __init__(self, rows, columns, group_size=128, dtype=BF, symmetric=False, rotate=False):
        self.group_size = group_size
        packed = torch.randint(-(2**31), 2**31, (rows, columns // 32), device="cuda")
        scales = torch.rand(rows, columns // group_size, device="cuda") + 0.5
        biases = -scales * (0.3 + 0.4 * torch.rand_like(scales))
        first = (
            packed.to(torch.int32),
            scales.to(dtype),
            None if symmetric else biases.to(dtype),
        )
        count = -(-CACHE_BYTES // (rows * columns // 8)) if rotate else 1
        copy = [[None if t is None else t.clone() for t in first] for _ in range(count - 1)]
        self.packed = [first, *map(tuple, copy)]

    def dense(self, dtype, rotate=False):
        """The same weights decoded, rotating likewise."""
        w = ops.dequantize(*self.packed[0], self.group_size).to(dtype)
        count = -(-CACHE_BYTES // (w.numel() * w.element_size())) if rotate else 1
        return [w, *(w.clone() for _ in range(count - 1))]

    def exact(self):
        """They in float64, where the rounding of decoded weights counts as error, as it should."""
        words, *levels = self.packed[0]
        wide = [None if t is None else t.double() for t in levels]
        return torch_onebit.dequantize(words, *wide, self.group_size)


def error(y, exact) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def compared(what, m, n, k, ours_us, theirs_us, **more) -> Row:
    """The row of one product beside another's."""
    ratio = theirs_us / ours_us
    sizes = {"m": m, "n": n, "k": k}
    return {"what": what, **sizes, "us": ours_us, "torch_us": theirs_us, "ratio": ratio, **more}


def product(what, m, n, k, *, dtype=BF, group_size=128, symmetric=False, transpose=True) -> Row:
    """One product against F.linear, or x @ W, in the same dtype."""
    rotate = m <= 64
    rows, columns = (n, k) if transpose else (k, n)
    w = Weight(rows, columns, group_size, dtype, symmetric, rotate)
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    dense = w.dense(dtype, rotate)
    plain = (lambda d: F.linear(x, d)) if transpose else (lambda d: x @ d)

    def ours(p):
        return ops.qmm(x, *p, w.group_size, transpose)

    few = slice(0, min(m, 32))
    exact_w = w.exact()
    exact = x[few].double() @ (exact_w.mT if transpose else exact_w)
    errors = error(ours(w.packed[0])[few], exact), error(plain(dense[0])[few], exact)
    del exact_w
    repeat = 1 if rotate else max(1, int(2e11 / (2 * m * n * k)))
    theirs_us = graph_us([lambda d=d: plain(d) for d in dense] * repeat)
    ours_us = graph_us([lambda p=p: ours(p) for p in w.packed] * repeat)
    return compared(
        what,
        m,
        n,
        k,
        ours_us,
        theirs_us,
        error=errors[0],
        torch_error=errors[1],
        tflops=2 * m * n * k / ours_us / 1e6,
    )


def limits() -> dict:
    """What the card does at best, in the same run."""
    a = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    copy_us = graph_us([lambda: b.copy_(a)] * 2)
    x, w = (torch.randn(8192, 8192, device="cuda", dtype=BF) for _ in range(2))
    product_us = graph_us([lambda: x @ w.mT] * 3)
    one = torch.zeros(32, device="cuda")
    return {
        "copy_bytes_per_second": 2 * a.numel() / copy_us * 1e6,
        "bfloat16_flops": 2 * 8192**3 / product_us * 1e6,
        "empty_kernel_us": graph_us([lambda: one.add_(1)] * 200),
    }


def few_rows() -> list[Row]:
    rows = [product("few rows, bfloat16", 1, n, k) for n, k in SHAPES]
    rows.append(product("few rows, bfloat16", 1, *HEAD))
    for m in (2, 4, 8, 16, 32, 64):
        rows.append(product("few rows, bfloat16", m, 14336, 4096))
    for m in (8, 16, 32, 64):
        rows.append(product("few rows, bfloat16", m, 4096, 4096))
    rows += [product("few rows, bfloat16", m, 4096, 14336) for m in (16, 64)]
    rows += [product("few rows, bfloat16", 8, *HEAD)]
    return rows


def few_rows_float() -> list[Row]:
    rows = [product("few rows, float32", 1, n, k, dtype=torch.float32) for n, k in SHAPES[:3]]
    return rows + [
        product("few rows, float32", m, 14336, 4096, dtype=torch.float32) for m in (4, 8)
    ]


def many_rows() -> list[Row]:
    rows = [product("many rows, bfloat16", m, n, k) for n, k in SHAPES[:3] for m in (128, 256, 512)]
    rows += [product("many rows, bfloat16", m, n, k) for n, k in SHAPES[:2] for m in (2048, 8192)]
    return rows


def not_transposed() -> list[Row]:
    return [
        product("x W, bfloat16", m, 4096, 4096, transpose=False) for m in (128, 512, 2048, 4096)
    ]


def many_rows_float() -> list[Row]:
    shapes = [(128, 4096, 4096), (512, 4096, 4096), (2048, 4096, 4096), (512, 14336, 4096)]
    return [product("many rows, float32", *shape, dtype=torch.float32) for shape in shapes]


def other_groups() -> list[Row]:
    cases = [("group 64", 64, False), ("group 32", 32, False), ("symmetric", 128, True)]
    return [
        product(name, m, 14336, 4096, group_size=group_size, symmetric=symmetric)
        for m in (1, 2, 4, 8, 16, 64, 256)
        for name, group_size, symmetric in cases
    ]


def without_wgmma() -> list[Row]:
    """Products as an Ampere GPU chooses them: for ``ONEBIT_CUDA_ARCHITECTURE=80``."""
    rows = (16, 32, 64, 128, 256)
    found = [product("as on sm_80", m, n, k) for n, k in SHAPES[:3] for m in rows]
    return found + [
        product(f"as on sm_80, group {group_size}", m, 14336, 4096, group_size=group_size)
        for m in (32, 64)
        for group_size in (64, 32)
    ]


def row_operators(copy_bytes_per_second: float) -> list[Row]:
    """Bytes moved per second, as a share of what a copy moves; embedding against F.embedding.

    Repeated in the graph: the launch of a graph with one kernel would count as a part of it.
    """
    rows, columns = 32768, 8192
    found = []
    for dtype in (BF, torch.float32):
        w = torch.randn(rows, columns, device="cuda", dtype=dtype)
        packed = ops.quantize(w, 128)
        moved = w.numel() * w.element_size() + sum(t.numel() * t.element_size() for t in packed)
        for name, call in (
            ("quantize", lambda w=w: ops.quantize(w, 128)),
            ("dequantize", lambda p=packed: ops.dequantize(*p, 128)),
        ):
            us = graph_us([call] * 5)
            share = moved / us * 1e6 / copy_bytes_per_second
            found.append({"what": f"{name} {dtype}"[:23], "us": us, "ratio": share})
    w = torch.randn(rows, columns, device="cuda", dtype=BF)
    packed = ops.quantize(w, 128)
    ids = torch.randint(0, rows, (8192,), device="cuda")
    ours = graph_us([lambda: ops.embedding(ids, *packed, 128)] * 10)
    theirs = graph_us([lambda: F.embedding(ids, w)] * 10)
    found.append({"what": "embedding", "us": ours, "torch_us": theirs, "ratio": theirs / ours})
    w = torch.randn(8192, 8192, device="cuda", dtype=BF)
    for rule in torch_onebit.ops.RULES:
        us = graph_us([lambda rule=rule: torch.ops.onebit.fake_quantize(w, rule, 128)] * 5)
        share = 2 * w.numel() * 2 / us * 1e6 / copy_bytes_per_second
        found.append({"what": f"fake_quantize {rule}", "us": us, "ratio": share})
    return found


def host_time() -> list[Row]:
    """What a call costs before the GPU has anything to do, in microseconds, eager."""
    w, x = Weight(4096, 4096), torch.randn(1, 4096, device="cuda", dtype=BF)
    dense = w.dense(BF)[0]
    qmm = torch.ops.onebit.qmm.default
    found = []
    with torch.no_grad():
        calls = {
            "F.linear": lambda: F.linear(x, dense),
            "qmm, 1 row": lambda: qmm(x, *w.packed[0], 128, True),
        }
        x8, x64 = (torch.randn(m, 4096, device="cuda", dtype=BF) for m in (8, 64))
        calls["qmm, 8 rows"] = lambda: qmm(x8, *w.packed[0], 128, True)
        calls["qmm, 64 rows"] = lambda: qmm(x64, *w.packed[0], 128, True)
        best = dict.fromkeys(calls, float("inf"))
        for call in calls.values():
            call()
        for _ in range(7):
            for name, call in calls.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(200):
                    call()
                best[name] = min(best[name], (time.perf_counter() - start) / 200 * 1e6)
    for name, us in best.items():
        found.append({"what": f"host, {name}", "us": us, "ratio": best["F.linear"] / us})
    return found


def int4() -> list[Row]:
    """torch's own 4-bit product, on the same shapes."""
    found = []
    for n, k in SHAPES[:2]:
        for m in (1, 8, 16, 64):
            w, x = Weight(n, k, rotate=True), torch.randn(m, k, device="cuda", dtype=BF)
            raw = torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device="cuda")
            packed = torch.ops.aten._convert_weight_to_int4pack(raw, 8)
            zeros = torch.ones(k // 128, n, 2, device="cuda", dtype=BF)
            copies = [packed.clone() for _ in range(-(-CACHE_BYTES // (n * k // 2)))]
            theirs = graph_us(
                [
                    lambda p=p, x=x, zeros=zeros: torch.ops.aten._weight_int4pack_mm(
                        x, p, 128, zeros
                    )
                    for p in copies
                ]
            )
            ours = graph_us([lambda p=p, x=x: ops.qmm(x, *p, 128) for p in w.packed])
            found.append(compared("torch int4", m, n, k, ours, theirs))
    return found


def gemlite_product(n: int, k: int, rows: tuple[int, ...]) -> list[Row]:
    """gemlite's 1-bit layer in float16, of the same bits and levels, against ours."""
    from gemlite import DType, GemLiteLinear

    half = torch.float16
    w = Weight(n, k, dtype=half, rotate=True)
    theirs = []
    for packed, scales, biases in w.packed:
        layer = GemLiteLinear(
            1,
            group_size=128,
            in_features=k,
            out_features=n,
            input_dtype=DType.FP16,
            output_dtype=DType.FP16,
        )
        bits = torch_onebit.unpack_bits(packed).to(torch.uint8)
        layer.pack(bits, scales.clone(), (-biases.float() / scales.float()).half(), None)
        theirs.append(layer)
    dense = w.exact()
    found = []
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=half)
        exact = x.double() @ dense.mT
        theirs_us = graph_us([lambda layer=layer, x=x: layer(x) for layer in theirs])
        ours_us = graph_us([lambda p=p, x=x: ops.qmm(x, *p, 128) for p in w.packed])
        errors = {
            "error": error(ops.qmm(x, *w.packed[0], 128), exact),
            "torch_error": error(theirs[0](x), exact),
        }
        found.append(compared("gemlite, 1 bit, float16", m, n, k, ours_us, theirs_us, **errors))
    return found


def gemlite() -> list[Row]:
    """Another library's 1-bit products, where it is installed: ``pip install gemlite``."""
    import gemlite

    gemlite.set_autotune("fast")
    rows = gemlite_product(4096, 4096, (1, 4, 8, 16, 64))
    return rows + gemlite_product(14336, 4096, (1, 8, 64))


SECTIONS = {
    "few_rows": few_rows,
    "few_rows_float": few_rows_float,
    "many_rows": many_rows,
    "not_transposed": not_transposed,
    "many_rows_float": many_rows_float,
    "other_groups": other_groups,
    "host_time": host_time,
    "int4": int4,
}


def line(row: Row) -> list[str]:
    size = f"{row['m']} x {row['n']} x {row['k']}" if "m" in row else ""
    theirs = f"{row['torch_us']:.2f}" if "torch_us" in row else ""
    errors = f"{row['error']:.1e} / {row['torch_error']:.1e}" if "error" in row else ""
    return [row["what"], size, f"{row['us']:.2f}", theirs, f"{row['ratio']:.2f}", errors]


HEADER = ["", "m x n x k", "us", "torch us", "ratio", "error, ours / torch's"]


def report() -> None:
    """Write the tables between their marks of docs/cuda.md."""
    for mark, file in (("cuda", RESULTS), ("cuda h200", RESULTS.with_name("cuda_h200.json"))):
        results = json.loads(file.read_text())
        limit = results["limits"]
        where = (
            f"{results['device']}, torch {results['torch']}; copy "
            f"{limit['copy_bytes_per_second'] / 1e12:.2f} TB/s, bfloat16 8192³ "
            f"{limit['bfloat16_flops'] / 1e12:.0f} TFLOP/s, a kernel of one element in a graph "
            f"{limit['empty_kernel_us']:.1f} us."
        )
        table = pages.table(HEADER, [line(row) for row in results["rows"]])
        pages.put(ROOT / "docs" / "cuda.md", mark, f"{where}\n\n{table}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)}, rows")
    parser.add_argument("--report", action="store_true", help="only the page, from the JSON")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.report:
        report()
        return
    results = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "limits": limits(),
        "rows": [],
    }
    print(results["device"], results["limits"], flush=True)
    copy = results["limits"]["copy_bytes_per_second"]
    sections = {**SECTIONS, "row_operators": lambda: row_operators(copy)}
    if importlib.util.find_spec("gemlite"):
        sections["gemlite"] = gemlite
    else:
        print("gemlite is not installed: its rows are left out")
    if "ONEBIT_CUDA_ARCHITECTURE" in os.environ:
        sections = {"without_wgmma": without_wgmma}
    for name in args.sections or sections:
        found = sections[name]()
        results["rows"] += found
        for row in found:
            print("  ".join(cell.ljust(24 if i == 0 else 20) for i, cell in enumerate(line(row))))
        sys.stdout.flush()
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
