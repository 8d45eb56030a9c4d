"""Device memory that the Metal kernels read, over the least they could, counted on an emulated GPU.

    python benchmarks/bench_metal_traffic.py

Runs on Linux; needs the packages of requirements-dev.txt. Counts are exact and do not depend on the
machine. Lanes of a simdgroup that read one address with one instruction count once; nothing else is
taken for a cache hit, so a GPU reads at most this much.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "metal"), str(TESTS.parent)]

import host_build  # noqa: E402
import traffic  # noqa: E402
from tqdm import tqdm  # noqa: E402

import torch_onebit  # noqa: E402, F401

# m, n, k, group size, transpose, where it comes from. n is cut where the emulator would take
# minutes: every ratio but that of x is the same for any n.
SHAPES = [
    (1, 4096, 4096, 128, True, "8B attention, decoding"),
    (1, 1024, 2560, 128, True, "4B key and value, decoding"),
    (1, 512, 12288, 128, True, "8B down, decoding (n cut)"),
    (1, 1024, 4096, 32, True, "groups of 32"),
    (2, 512, 4096, 128, True, "2 rows (n cut)"),
    (4, 512, 4096, 128, True, "4 rows (n cut)"),
    (8, 512, 4096, 128, True, "8 rows (n cut)"),
    (32, 256, 4096, 128, True, "32 rows (n cut)"),
    (128, 128, 2560, 64, True, "prefill of 128 (n cut)"),
    (1, 4096, 1024, 128, False, "backward of one row"),
    (32, 512, 1024, 128, False, "backward of 32 rows (n cut)"),
]


def main() -> None:
    host_build.load()
    head = f"{'kernel':<18}{'m':>4}{'n':>6}{'k':>7}{'group':>6}"
    print(f"{head}{'packed':>8}{'scales':>8}{'biases':>8}{'x':>8}  {'x/naive':>8}  shape of")
    for m, n, k, group_size, transpose, why in tqdm(SHAPES, file=sys.stderr):
        t = traffic.measure(m, n, k, group_size=group_size, transpose=transpose)
        shape = f"{t.kernel:<18}{m:>4}{n:>6}{k:>7}{group_size:>6}"
        ratios = "".join(f"{t.ratio(b):>8.2f}" for b in ("packed", "scales", "biases", "x"))
        print(f"{shape}{ratios}  {t.read['x'] / t.naive_x:>8.4f}  {why}")


if __name__ == "__main__":
    main()
