"""What the Metal kernels read, over the least they could, and wait for, counted on an emulated GPU.

    python benchmarks/bench_metal_traffic.py [--block ROWS]

With --block it counts the packed layers of one block of a decoder, for so many tokens at once.

Runs on Linux; needs the packages of requirements-dev.txt. Counts are exact and do not depend on the
machine. `packed` to `x` are bytes that simdgroups ask for: lanes that read one address with one
instruction count once. `L1` are bytes of packed that an L1 of 8 KB, with lines of 128 bytes and
one threadgroup, would not have. `banks` are cycles of threadgroup memory, over those without
conflicts; inside a tensor operation, which is the system's, they say nothing.
"""

import argparse
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


def print_block(rows: int) -> None:
    b = traffic.block(rows)
    launches = sum(b.kernels.values()) * traffic.BLOCKS
    print(f"{rows} tokens at once, {traffic.BLOCKS} blocks: {launches} launches, ", end="")
    print(f"{b.helpers * traffic.BLOCKS} other operations, {launches // 32} commits")
    print(f"kernels of a block: {b.kernels}")
    for name in traffic.BUFFERS:
        print(f"{name}: {b.read[name] / 1e6:.2f} MB read, {b.missed[name] / 1e6:.2f} not in the L1")
    print(f"cycles of banks over the least: {b.bank_cycles / max(b.bank_least, 1):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block", type=int, metavar="ROWS")
    rows = parser.parse_args().block
    host_build.load()
    if rows:
        return print_block(rows)
    head = f"{'kernel':<18}{'m':>4}{'n':>6}{'k':>7}{'group':>6}"
    print(f"{head}{'packed':>8}{'scales':>8}{'biases':>8}{'x':>8}{'L1':>8}{'banks':>8}  shape of")
    for m, n, k, group_size, transpose, why in tqdm(SHAPES, file=sys.stderr):
        t = traffic.measure(m, n, k, group_size=group_size, transpose=transpose)
        shape = f"{t.kernel:<18}{m:>4}{n:>6}{k:>7}{group_size:>6}"
        ratios = "".join(f"{t.ratio(b):>8.2f}" for b in ("packed", "scales", "biases", "x"))
        missed = t.missed["packed"] / t.minimum["packed"]
        print(f"{shape}{ratios}{missed:>8.2f}{t.conflicts:>8.2f}  {why}")


if __name__ == "__main__":
    main()
