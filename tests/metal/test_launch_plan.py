"""Which kernel runs on which grid, on every platform."""

import ctypes
import itertools
import re
from dataclasses import dataclass

import pytest
import toolchain


@pytest.fixture(scope="module")
def probe():
    headers = [
        toolchain.ROOT / "csrc/mps/launch_plan.h",
        toolchain.ROOT / "csrc/mps/params.h",
        toolchain.ROOT / "csrc/format.h",
    ]
    # C++17 with neither torch nor Metal in reach.
    compiler = ["g++", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    source = toolchain.HERE / "launch_plan_probe.cpp"
    key = toolchain.digest(*(p.read_bytes() for p in [source, *headers]))
    library = toolchain.cache_directory() / f"launch-plan-{key}.so"
    if not library.exists():
        toolchain.run([*compiler, str(source), "-o", str(library)])
    return ctypes.CDLL(str(library))


FLOAT, HALF, BFLOAT = range(3)
# family and cores of a GPU, and whether it has tensor operations
M1, M3_MAX, M5, M5_OLD_SYSTEM = (7, 7), (9, 24), (10, 10, 1), (10, 10)


@dataclass
class Plan:
    kernel: str
    rows: int
    groups: tuple[int, ...]
    threads: int
    partial: bool
    splits: int
    split_k: int
    sum_groups: int


def plan(
    probe, m, n, k, *, transpose=True, group_size=128, batches=1, x_matrices=1, w_matrices=1,
    indexed=False, is_sorted=False, gpu=M1, dtype=HALF,
):  # fmt: skip
    values = [m, n, k, group_size, transpose, batches, x_matrices, w_matrices, indexed, is_sorted]
    values.append(dtype)
    out = ctypes.create_string_buffer(200)
    probe.plan(
        (ctypes.c_int * 3)(*gpu), (ctypes.c_int64 * len(values))(*values), out, ctypes.c_size_t(200)
    )
    kernel, rows, groups, *rest = out.value.decode().split()
    numbers = [int(r) for r in rest]
    grid = tuple(int(g) for g in groups.split("x"))
    return Plan(kernel, int(rows), grid, numbers[0], bool(numbers[1]), *numbers[2:])


# m, n, k, transpose, GPU, kernel and rows of its instance, grid, splits, why
TABLE = [
    (1, 4096, 4096, True, M1, ("qmv", 0), (256, 1, 1), 1, "decoding"),
    (1, 4097, 2560, True, M1, ("qmv", 0), (257, 1, 1), 1, "no slow path for odd n or k"),
    (1, 8, 32, True, M1, ("qmv", 0), (1, 1, 1), 1, "the smallest"),
    (2, 4096, 4096, True, M1, ("qmv_wide", 2), (512, 1, 1), 1, "two rows"),
    (5, 4096, 4096, True, M1, ("qmv_wide", 6), (1024, 1, 1), 1, "the next instance"),
    (8, 4096, 4096, True, M1, ("qmv_wide", 8), (1024, 1, 1), 1, "the widest"),
    (9, 4096, 4096, True, M1, ("qmm", 32), (128, 1, 1), 1, "tiles"),
    (32, 4096, 4096, True, M1, ("qmm", 32), (128, 1, 1), 1, "one tile of 32 rows"),
    (33, 4096, 4096, True, M1, ("qmm", 64), (128, 1, 1), 1, "one of 64 reads w once"),
    (512, 4096, 4096, True, M1, ("qmm", 64), (128, 8, 1), 1, "prefill"),
    (16, 256, 8192, True, M1, ("qmm", 32), (8, 1, 4), 4, "few tiles, long k"),
    (16, 256, 8192, True, M3_MAX, ("qmm", 32), (8, 1, 16), 16, "more cores, more splits"),
    (16, 256, 512, True, M3_MAX, ("qmm", 32), (8, 1, 1), 1, "k too short to split"),
    (1, 4096, 4096, True, M5, ("qmv", 0), (256, 1, 1), 1, "decoding needs no multiplier"),
    (8, 4096, 4096, True, M5, ("qmv_wide", 8), (1024, 1, 1), 1, "nor do few rows"),
    (9, 4096, 4096, True, M5, ("qmm_tensor", 32), (64, 1, 1), 1, "tensor operations"),
    (33, 4097, 4096, True, M5, ("qmm_tensor", 64), (65, 1, 1), 1, "an edge of outputs"),
    (64, 4096, 4096, True, M5, ("qmm_tensor", 64), (64, 1, 1), 1, "one tile of 64 rows"),
    (65, 4096, 4096, True, M5, ("qmm_tensor", 128), (64, 1, 1), 1, "one of 128"),
    (512, 4096, 4096, True, M5, ("qmm_tensor", 128), (64, 4, 1), 1, "prefill"),
    (16, 256, 8192, True, M5, ("qmm_tensor", 32), (4, 1, 16), 16, "few tiles, long k"),
    (512, 4096, 4096, True, M5_OLD_SYSTEM, ("qmm", 64), (128, 8, 1), 1, "before macOS 26.2"),
    (64, 160, 128, False, M5, ("qmm_n_tensor", 64), (3, 1, 1), 1, "backward"),
    (2, 4096, 4096, False, M5, ("qmm_n_tensor", 32), (64, 1, 1), 1, "backward of two rows"),
    (70, 256, 8191, False, M5, ("qmm_n_tensor", 128), (4, 1, 13), 13, "few tiles, long and odd k"),
    (1, 1024, 300, False, M5, ("qvm", 0), (1, 1, 1), 1, "backward of one row"),
    (64, 160, 128, False, M5_OLD_SYSTEM, ("qmm_n", 0), (2, 2, 1), 1, "before macOS 26.2"),
    (1, 4096, 4096, False, M1, ("qvm", 0), (4, 1, 7), 7, "backward of one row"),
    (1, 1024, 300, False, M1, ("qvm", 0), (1, 1, 1), 1, "backward, short k"),
    (2, 4096, 4096, False, M1, ("qmm_n", 0), (32, 1, 1), 1, "backward of two rows"),
    (64, 160, 100, False, M1, ("qmm_n", 0), (2, 2, 1), 1, "edges in both directions"),
]


@pytest.mark.parametrize("m, n, k, transpose, gpu, kernel, groups, splits, why", TABLE)
def test_plan(probe, m, n, k, transpose, gpu, kernel, groups, splits, why):
    p = plan(probe, m, n, k, transpose=transpose, gpu=gpu)
    assert ((p.kernel, p.rows), p.groups, p.splits) == (kernel, groups, splits)


@pytest.mark.parametrize("k", [1024, 1025, 2560, 5120, 9728, 17408, 100000])
@pytest.mark.parametrize("gpu", [M1, (9, 20), (8, 60)])
def test_splits_cover_k_without_an_empty_one(probe, k, gpu):
    for n in (32, 128, 1024, 4096):
        p = plan(probe, 1, n, k, transpose=False, group_size=32, gpu=gpu)
        assert (p.splits - 1) * p.split_k < k <= p.splits * p.split_k
        assert p.splits == 1 or p.split_k % 128 == 0
        assert p.partial == (p.splits > 1)
        assert p.sum_groups == (0 if p.splits == 1 else -(-n // 256))


@pytest.mark.parametrize(
    "dtype, gpu, rows, groups, why",
    [
        (FLOAT, M3_MAX, 0, (2, 4, 1), "tiles of float have 32 rows"),
        (BFLOAT, M1, 0, (2, 4, 1), "the M1 emulates matrices of bfloat"),
        (BFLOAT, M3_MAX, 64, (2, 2, 1), "the M3 has them"),
        (FLOAT, M5, 0, (2, 4, 1), "tensor operations round float32 to fewer bits"),
        (BFLOAT, M5, 128, (1, 1, 1), "tensor tiles"),
    ],
)
def test_tiles_by_dtype(probe, dtype, gpu, rows, groups, why):
    p = plan(probe, 100, 64, 128, gpu=gpu, dtype=dtype)
    assert (p.rows, p.groups) == (rows, groups)


def test_a_kernel_is_in_the_library_that_is_compiled_for_it(probe):
    planned, out = {}, ctypes.create_string_buffer(100)
    while True:
        probe.library(len(planned), out, ctypes.c_size_t(100))
        if not out.value:
            break
        kernel, library = out.value.decode().split()
        planned[kernel] = library
    defined = {
        kernel: path.stem
        for path in toolchain.SHADERS.glob("*.metal")
        for kernel in re.findall(r"\[\[kernel\]\] void (\w+)\(", path.read_text())
    }
    assert planned == defined


def test_batches_are_a_dimension_of_the_grid(probe):
    p = plan(probe, 1, 64, 128, batches=6, x_matrices=6, w_matrices=4, indexed=True)
    assert (p.kernel, p.groups) == ("qmv", (4, 1, 6))


@pytest.mark.parametrize(
    "batches, matrices, is_sorted, gpu, dtype, kernel, groups, why",
    [
        (64, 8, True, M1, HALF, "qmm_sorted", (3, 2, 1), "8 rows for each matrix"),
        (63, 8, True, M1, HALF, "qmv", (5, 1, 63), "fewer than 8 rows a matrix"),
        (64, 8, False, M1, HALF, "qmv", (5, 1, 64), "nobody says they are sorted"),
        (64, 8, True, M5, BFLOAT, "qmm_sorted_tensor", (2, 2, 1), "tensor operations"),
        (64, 8, True, M5, FLOAT, "qmm_sorted", (3, 2, 1), "not of float32"),
        (64, 8, True, M5_OLD_SYSTEM, HALF, "qmm_sorted", (3, 2, 1), "before macOS 26.2"),
        (64, 8, False, M5, HALF, "qmv", (5, 1, 64), "not sorted"),
    ],
)
def test_sorted_rows_share_a_pass(
    probe, batches, matrices, is_sorted, gpu, dtype, kernel, groups, why
):
    p = plan(
        probe, 1, 72, 128, batches=batches, w_matrices=matrices, indexed=True, is_sorted=is_sorted,
        gpu=gpu, dtype=dtype,
    )  # fmt: skip
    assert (p.kernel, p.groups) == (kernel, groups)


def group_plan(probe, *values):
    out = (ctypes.c_uint32 * 3)()
    probe.group_plan((ctypes.c_int * len(values))(*values), out)
    return tuple(out)


@pytest.mark.parametrize(
    "groups, threadgroups", [(1, 1), (8, 1), (9, 2), (2**26 - 1, 2**23)], ids=str
)
def test_a_simdgroup_owns_a_group(probe, groups, threadgroups):
    assert group_plan(probe, groups, 128, 0, 0, 0)[:2] == (threadgroups, 256)


def test_a_pipeline_is_compiled_for_each_group_size_rule_and_dtype(probe):
    choices = itertools.product((32, 64, 128), range(4), range(3), range(3))
    keys = {group_plan(probe, 1, *choice)[2] for choice in choices}
    assert len(keys) == 3 * 4 * 3 * 3
