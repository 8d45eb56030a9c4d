"""The launch plans of csrc/cuda, asked through a probe that g++ compiles: no CUDA, no torch."""

import ctypes
import functools
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TYPES = ("float", "half", "bfloat")
# In the order of launch_plan.h.
KERNELS = (
    "quantize", "decode", "split", "sum_partials", "planes", "b1", "hmma", "wgmma", "tiles",
    "gather_n", "affine_grad", "quantize_levels", "fake_quantize", "fake_quantize_backward",
    "fake_quantize_affine", "fake_quantize_affine_backward", "flip_bits",
)  # fmt: skip
H100 = (90, 132)


@functools.cache
def probe() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "probe.so"
        source = HERE / "launch_plan_probe.cpp"
        flags = ["-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


@dataclass
class Launch:
    kernel: str
    source: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    early: bool
    key: int
    options: tuple[str, ...]

    def define(self, macro: str) -> str:
        """The value that the kernel is compiled with."""
        start = f"-DONEBIT_{macro}="
        return next(o.removeprefix(start) for o in self.options if o.startswith(start))


def _launch(line: str) -> Launch:
    kernel, source, x, y, z, threads, shared, early, key, *options = line.split()
    grid = (int(x), int(y), int(z))
    numbers = int(threads), int(shared), early == "1", int(key)
    return Launch(kernel, source, grid, *numbers, tuple(options))


def _ask(function: str, values: list[int]) -> list[str]:
    out = ctypes.create_string_buffer(4000)
    array = (ctypes.c_int64 * len(values))(*values)
    getattr(probe(), function)(array, out, ctypes.c_size_t(len(out)))
    return out.value.decode().splitlines()


@dataclass
class ProductPlan:
    way: str
    splits: int
    stages: int
    launches: list[Launch]


def product(
    m, n, k, *, gpu=H100, group_size=128, transpose=True, batches=1, indexed=False, x="bfloat",
    levels=None, biases=True,
) -> ProductPlan:  # fmt: skip
    values = [*gpu, m, n, k, group_size // 32, transpose, batches, indexed]
    values += [TYPES.index(x), TYPES.index(levels or x), biases]
    first, *lines = _ask("product", values)
    way, splits, stages = first.split()
    return ProductPlan(way, int(splits), int(stages), [_launch(line) for line in lines])


def rows(
    kernel, groups, *, x="bfloat", other="bfloat", levels="bfloat", group_size=128, rule=0,
    importance=False, columns=None, biases=True, matrices=1,
) -> Launch:  # fmt: skip
    """A launch of a kernel that is no product; launch_plan_probe.cpp says what the numbers mean."""
    types = [TYPES.index(t) for t in (x, other, levels)]
    values = [KERNELS.index(kernel), groups, *types, group_size // 32, rule, importance]
    values += [columns or group_size, biases, matrices]
    return _launch(_ask("rows", values)[0])
