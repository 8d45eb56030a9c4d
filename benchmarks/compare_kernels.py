"""What a change of the CPU kernels costs: products by the kernels of two commits, interleaved.

    python benchmarks/compare_kernels.py bb4e00d HEAD

Builds the kernels, which need no torch, of both commits, and calls one after the other, in turns,
on one thread. The ratio is of the 10th percentiles: what other processes take does not count.
"""

import argparse
import ctypes
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType of csrc
BUILD = """set -e; mkdir {out}; cd {out}; git -C {root} archive {commit} csrc metal | tar -x
c++ -std=c++17 -O3 -w -fPIC -shared -fvisibility=hidden -Wl,-Bsymbolic -o kernels.so \\
  -Icsrc/cpu -Icsrc/cpu/kernels {shim} \\
  $(find csrc/cpu -name '*.cpp' | xargs grep -LE '<(torch|ATen|c10)/|"parallel.h"')"""


def build(commit: str, out: Path) -> ctypes.CDLL:
    shim = Path(__file__).with_suffix(".cpp")
    names = {"out": out, "root": ROOT, "commit": commit, "shim": shim}
    script = BUILD.format(**{name: shlex.quote(str(value)) for name, value in names.items()})
    subprocess.run(["bash", "-c", script], check=True)
    library = ctypes.CDLL(str(out / "kernels.so"))
    library.time_product.restype = ctypes.c_double
    return library


def compare(libraries: list, isa: str, dtype: torch.dtype, group: int, m: int, n: int, k: int):
    """Microseconds of each; None where a library has no such instruction set."""
    x = torch.randn(m, k).to(dtype)
    packed = torch.randint(-(2**31), 2**31, (n, k // 32), dtype=torch.int32)
    scales = (0.01 + 0.02 * torch.rand(n, k // group)).to(dtype)
    biases = (scales * -(0.45 + 0.1 * torch.rand(n, k // group))).to(dtype)
    tensors = [x, packed, scales, biases, torch.empty(m, n, dtype=dtype)]
    sizes = [*map(ctypes.c_int64, (m, n, k)), group, DTYPES[dtype]]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    times = [[] for _ in libraries]
    for call in range(20 + int(2e9 / (m * n * k))):
        order = list(zip(libraries, times, strict=True))
        for library, mine in order if call % 2 else order[::-1]:
            mine.append(library.time_product(isa.encode(), *sizes, *pointers))
    return None if times[0][0] < 0 else [sorted(t)[len(t) // 10] for t in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commits", nargs=2, help="before and after")
    parser.add_argument("--size", type=int, default=2048, help="of a square matrix")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        libraries = [build(c, Path(folder) / str(i)) for i, c in enumerate(args.commits)]
        print("| instructions | x | group | rows of x | before, us | after / before |")
        print("|---|---|---|---|---|---|")
        for isa in ("avx512", "avx2", "neon"):
            for dtype in DTYPES:
                for group in (128, 64, 32):
                    for m in (1, 8, 32):
                        both = compare(libraries, isa, dtype, group, m, args.size, args.size)
                        if both is not None:
                            before, after = both
                            print(
                                f"| {isa} | {str(dtype)[6:]} | {group} | {m} | {before:.0f} | "
                                f"{after / before:.2f} |",
                                flush=True,
                            )


if __name__ == "__main__":
    sys.exit(main())
