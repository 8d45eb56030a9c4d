"""Instructions of the ARM kernels for a multiply-add, counted in an emulator.

    python benchmarks/count_arm.py

Needs what `make test-arm` needs: aarch64-linux-gnu-g++ and qemu-aarch64, which runs a product
instruction by instruction and writes each down. Two products that differ in their outputs only
are subtracted: what is left packs weights, looks up and writes, as much as the rest of a matrix
would. (Tables of x are built once for all outputs.) It is a count, not a time.
"""

import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": 0, "bfloat16": 2}  # DType of csrc
COLUMNS, FEW, MORE = 1024, 128, 256  # as in the program
MAIN = """
#include <cstdlib>
#include <vector>
#include "kernels.h"
using namespace onebit;
using namespace onebit::cpu;
int main(int, char** argv) {
  const auto dtype = DType(std::atoi(argv[1]));
  const int64_t m = std::atoi(argv[2]), n = std::atoi(argv[3]), k = 1024, group = 128, most = 256;
  std::vector<uint32_t> x(m * k), words(most * k / 32, 0x5a3c9617), y(m * most);
  std::vector<uint16_t> scales(most * k / group, 0x3f80);
  for (size_t i = 0; i < x.size(); ++i) {  // 1 and -2, by turns
    x[i] = dtype == DType::kBFloat16 ? 0xc0003f80 : i % 2 ? 0xc0000000 : 0x3f800000;
  }
  int count;
  available_kernels(&count)[0]->qmm_t(
      {x.data(), y.data(), dtype, m, n, k,
       {words.data(), scales.data(), nullptr, DType::kBFloat16, n, k, group}},
      {0, m, 0, n});
}
"""


def build(folder: Path) -> Path:
    (folder / "main.cpp").write_text(MAIN)
    program = folder / "main"
    sources = sorted((ROOT / "csrc/cpu/kernels").rglob("*.cpp"))
    command = ["aarch64-linux-gnu-g++", "-std=c++17", "-O3", "-static", "-pthread"]
    include = f"-I{ROOT / 'csrc/cpu/kernels'}"
    subprocess.run([*command, include, folder / "main.cpp", *sources, "-o", program], check=True)
    return program


def instructions(program: Path, dtype: int, m: int, n: int) -> int:
    log = program.with_name("log")
    step = ["qemu-aarch64", "-singlestep", "-d", "exec,nochain", "-D", log]
    subprocess.run([*step, program, str(dtype), str(m), str(n)], check=True)
    with log.open("rb") as lines:
        return sum(line.startswith(b"Trace") for line in lines)


def main() -> None:
    rows = (1, 4, 8)
    print("| x | " + " | ".join(f"{m} row{'s' * (m > 1)}" for m in rows) + " |")
    print("|---" * (len(rows) + 1) + "|")
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for name, dtype in DTYPES.items():
            counts = []
            for m in rows:
                more, few = (instructions(program, dtype, m, n) for n in (MORE, FEW))
                counts.append((more - few) / (m * COLUMNS * (MORE - FEW)))
            print(f"| {name} | " + " | ".join(f"{count:.3f}" for count in counts) + " |")


if __name__ == "__main__":
    main()
