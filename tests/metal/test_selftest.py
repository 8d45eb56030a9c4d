"""The selftest reaches every kernel, and fails for a kernel that is wrong, idle or not launched."""

import json
import re
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor

import emulator
import pytest
import torch
from host_build import GPUS, M1, M5
from test_mps import kernels_of, log, weights
from toolchain import ROOT, SHADERS

from torch_onebit import selftest
from torch_onebit.selftest import cases, report, speed


def test_it_passes_and_its_rows_are_every_kernel(monkeypatch):
    log()
    for gpu in GPUS:
        monkeypatch.setenv("ONEBIT_FAKE_GPU", gpu)
        assert [str(row) for row in selftest.rows("mps") if not row.passed] == []
    library = emulator.Library(sorted(SHADERS.glob("*.metal")), [SHADERS])
    assert set(kernels_of(log())) == set(library.kernels())


@pytest.mark.parametrize("error, passed", [(1e-3, True), (2e-3, False), (float("nan"), False)])
def test_a_row_says_whether_it_passed(error, passed):
    row = cases.Row("qmv", torch.float16, error, allowed=1e-3)
    assert row.passed == passed and ("FAIL" in str(row)) != passed


# file, before, after; the start of the rows that must find it. One defect for each way a kernel can
# be wrong on one Mac and right in the emulator: an index, a sign, a bound, a dtype, an order.
MUTANTS = {
    "qmv: last row": ("qmv.metal", "min(row0 + r, p.n - 1)", "min(row0 + r, p.n - 2)"),
    "qmv: matrix of w": ("qmv.metal", "matrices.w * p.n + min", "min", "gather"),
    "qmv: matrix of x": ("qmv.metal", "x += matrices.x * p.k;", "", "gather"),
    "qmv: group of a word": ("qmv.metal", "(word >> p.group_shift)", "(word >> 1)"),
    "qmv: levels swapped": ("qmv.metal", "select(levels.bias, one,", "select(one, levels.bias,"),
    "qmv: a sum in half": ("qmv.metal", "sum[r] += (part[0]", "sum[r] += float(half(part[0])"),
    "qmv: a part is lost": ("qmv.metal", "(part[1] + part[3])", "part[1]"),
    "qmv_wide: odd terms are lost": ("qmv_wide.metal", "(part[0] + part[1])", "part[0]"),
    "qmv: last word": ("qmv.metal", "word < words;", "word + 1 < words;"),
    "levels: absent biases": ("common.h", "-0.5f * levels.scale", "0.5f * levels.scale"),
    "levels: another dtype": (
        "common.h",
        "return read_as(kLevelType, values, i);",
        "return float(((const device half*)values)[i]);",
    ),
    "qmv_wide: last row of x": ("qmv_wide.metal", "min(m, p.m - 1)", "min(m, 1u)"),
    "qmv_wide: group of a word": ("qmv_wide.metal", "(word >> p.group_shift)", "(word >> 2)"),
    "qmv_wide: batch of y": ("qmv_wide.metal", "(group.z * p.m + m)", "m", "call"),
    "qmm: batch of y": ("qmm.metal", "y + (group.z * p.m + m0) * p.n", "y + m0 * p.n", "qmm, k"),
    "qmm: end of a split": ("qmm.metal", "k_end / uint(kWordBits)", "p.k / uint(kWordBits)"),
    "qmm: second tile of rows": ("qmm.metal", "group.y * 16 * I", "group.y * 8 * I"),
    "tile: levels once": ("tile.h", "(word & group_mask) == 0 ||", "", "qmm"),
    "tile: another thread's word": ("tile_levels.h", "kThreads + i % kThreads", "kThreads", "qmm"),
    "tile: all hold the first word": ("tile_levels.h", "thread_index % kThreads;", "0;", "qmm"),
    "tile: no barrier": (
        "tile.h",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    multiply",
        "    multiply",
        "qmm",
    ),
    "tile: half the sums": ("tile.h", "      add_to(block[0], block[1]);\n", "", "qmm"),
    "tile: w not transposed": ("tile.h", "stride, ulong2(0), true)", "stride)", "qmm"),
    "tile: sums in half": (
        "tile.h",
        "reinterpret_cast<thread float2&>(block.thread_elements());",
        "float2(half2(reinterpret_cast<thread float2&>(block.thread_elements())));",
        "qmm",
    ),
    "qmm_tensor: levels once": ("qmm_tensor.metal", "(word & group_mask) == 0 ||", ""),
    "qmm_tensor: matrix of w": (
        "qmm_tensor.metal",
        "(inside ? n0 + row : 0)",
        "(inside ? row : 0)",
    ),
    "qmm_tensor: end of a split": (
        "qmm_tensor.metal",
        "min(p.k, split * p.split_k + p.split_k)",
        "p.k",
        "qmm_tensor, 32 rows, k",
    ),
    "qmm_tensor: first word": ("qmm_tensor.metal", "x_rows + word * kWordBits", "x_rows"),
    "qmm_tensor: w not transposed": (
        "qmm_tensor.metal",
        "false, true, false",
        "false, false, false",
    ),
    "qmm_tensor: relaxed precision": (
        "qmm_tensor.metal",
        "false, true, false",
        "false, true, true",
    ),
    "qmm_tensor: the last step only": (
        "qmm_tensor.metal",
        "mode::multiply_accumulate",
        "mode::multiply",
    ),
    "qmm_tensor: sums that start anywhere": (
        "tensor_tile.h",
        "sum[i] = 0.0f;",
        ";",
        "qmm_tensor",
    ),
    "qmm_tensor: elements that are none": (
        "tensor_tile.h",
        "if (!sum.is_valid_element(i)) continue;",
        "",
        "qmm_tensor",
    ),
    "qmm_tensor: row and column": ("tensor_tile.h", "uint(at[1])", "uint(at[0])", "qmm_tensor"),
    "qmm_tensor: layout of another GPU": (
        "tensor_tile.h",
        "get_multidimensional_index(i)",
        "get_multidimensional_index(ushort(i ^ 2))",
        "qmm_tensor",
    ),
    "qmm_tensor: rows past the last": (
        "qmm_tensor.metal",
        "int(count)",
        "int(M)",
        "qmm_tensor, 32",
    ),
    "qmm_tensor: outputs past the last": ("tensor_tile.h", "column >= n", "false", "qmm_tensor"),
    "qmm_tensor: no barrier": (
        "qmm_tensor.metal",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);\n",
        "",
    ),
    "qmm_tensor: one half": ("qmm_tensor.metal", "(word & 1) * half_elements", "0"),
    "qmm_tensor: stride of a tile": ("qmm_tensor.metal", "{1, int(stride)}", "{1, 32}"),
    "qmm_tensor: batch of y": (
        "qmm_tensor.metal",
        "y + (group.z * p.m + m0) * p.n",
        "y + m0 * p.n",
        "qmm_tensor, 32 rows, k",
    ),
    "qmm_n_tensor: end of k": (
        "qmm_n_tensor.metal",
        "int(min(kTileK, k_end - k0))",
        "int(kTileK)",
    ),
    "qmm_n_tensor: end of a split": (
        "qmm_n_tensor.metal",
        "min(p.k, k_begin + p.split_k)",
        "p.k",
        "qmm_n_tensor, 32 rows, k",
    ),
    "qmm_n_tensor: batch of y": (
        "qmm_n_tensor.metal",
        "y + (group.z * p.m + m0) * p.n",
        "y + m0 * p.n",
        "qmm_n_tensor, 32 rows, k",
    ),
    "qmm_n_tensor: levels of a step": ("qmm_n_tensor.metal", "+ k * groups", "+ k0 * groups"),
    "qmm_n_tensor: group of a word": ("qmm_n_tensor.metal", "word >> p.group_shift", "word"),
    "qmm_n_tensor: one word": ("qmm_n_tensor.metal", "row * stride + column", "row * stride + 0"),
    "qmm_n_tensor: w transposed": (
        "qmm_n_tensor.metal",
        "false, false, false",
        "false, true, false",
    ),
    "qmm_n_tensor: relaxed precision": (
        "qmm_n_tensor.metal",
        "false, false, false",
        "false, false, true",
    ),
    "qmm_n_tensor: first rows of w": ("qmm_n_tensor.metal", "x_rows + k0", "x_rows"),
    "qmm_n_tensor: stride of a tile": ("qmm_n_tensor.metal", "{1, int(stride)}", "{1, 64}"),
    "qmm_n_tensor: no barrier": (
        "qmm_n_tensor.metal",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);\n",
        "",
    ),
    "qmm_sorted_tensor: one pass": ("qmm_sorted_tensor.metal", "next.w != first.w ||", ""),
    "qmm_sorted_tensor: rows of the pass before": (
        "tensor_tile.h",
        "row < block.row_begin ||",
        "",
        "qmm_sorted_tensor",
    ),
    "qmm_sorted_tensor: sums of the pass before": (
        "qmm_sorted_tensor.metal",
        "    clear_sums(sum);\n",
        "    if (begin == 0) clear_sums(sum);\n",
    ),
    "qmm_sorted_tensor: matrix of w": ("qmm_sorted_tensor.metal", "first.w * p.n + (in", "(in"),
    "qmm_sorted_tensor: levels once": (
        "qmm_sorted_tensor.metal",
        "(word & group_mask) == 0",
        "word == 0",
    ),
    "qmm_sorted_tensor: relaxed precision": (
        "qmm_sorted_tensor.metal",
        "false, true, false",
        "false, true, true",
    ),
    "qmm_sorted_tensor: no barrier": (
        "qmm_sorted_tensor.metal",
        "      threadgroup_barrier(mem_flags::mem_threadgroup);\n",
        "",
    ),
    "qmm_sorted: one pass": ("qmm.metal", "next.w != first.w ||", "", "qmm_sorted"),
    "qmm_n: group of a word": ("qmm_n.metal", "(word & group_mask) == 0", "false"),
    "qmm_n: end of k": ("qmm_n.metal", "k0 + part + i < k_end", "k0 + part + i + 1 < k_end"),
    "qvm: one level": ("qvm.metal", "levels.scale + levels.bias", "levels.scale"),
    "qvm: simdgroups": ("qvm.metal", "s < kQvmSimdgroups", "s + 1 < kQvmSimdgroups"),
    "decode: rows": ("decode.metal", "row * p.words + word", "word"),
    "decode: absent biases": ("decode.metal", "float(T(-0.5f * scale))", "-0.25f * scale"),
    "quantize: a tie is 1": (
        "quantize.metal",
        "value[i] - bias > 0.5f",
        "value[i] - bias >= 0.5f",
        "quantize, ",
    ),
    "quantize: scale": (
        "quantize.metal",
        "scales[group] = T(scale);",
        "scales[group] = T(high);",
        "quantize, ",
    ),
    "quantize: bias": (
        "quantize.metal",
        "biases[group] = T(bias);",
        "biases[group] = T(-bias);",
        "quantize, ",
    ),
    "affine_grad: no bits": ("affine_grad.metal", "bit_of(bits[r], i)", "true"),
    "affine_grad: sides": ("affine_grad.metal", "p.x_by_row ? x", "!p.x_by_row ? x"),
    "flip_bits: fused": ("common.h", "#pragma METAL fp contract(off)", "", "flip_bits"),
    "sum_partials: the last": ("sum_partials.metal", "s < p.splits", "s + 1 < p.splits", "qvm, k"),
}
# files whose kernels run under the names of another file
ALSO = {
    "qmm.metal": ["sum_partials"],
    "qmm_tensor.metal": ["sum_partials"],
    "qmm_n.metal": ["sum_partials"],
    "qmm_n_tensor.metal": ["sum_partials"],
    "qvm.metal": ["sum_partials"],
}
LIBRARIES = {
    "common.h": {"flip_bits": ["flip_bits"]},
    "tile_levels.h": {"qmm": ["qmm", "sum_partials"]},
    "tile.h": {"qmm": ["qmm", "sum_partials"]},
    "tensor_tile.h": {
        "qmm_tensor": ["qmm_tensor", "sum_partials"],
        "qmm_sorted_tensor": ["qmm_sorted_tensor"],
    },
    "sum_partials.metal": {"qvm, k": ["qvm", "sum_partials"]},
}


def target(defect: str) -> tuple[str, list[str]]:
    """The rows to run, and the shaders they need."""
    file, _, _, *rows = MUTANTS[defect]
    name = rows[0] if rows else defect.split(":")[0]
    if file in LIBRARIES:
        return (name, LIBRARIES[file].get(name, ["qmv"])) if rows else ("qmv", ["qmv"])
    stem = file.removesuffix(".metal")
    return name, [stem, *ALSO.get(file, [])]


def broken(folder, defect: str) -> str:
    """The shaders that matter, with the defect, without the instances for bfloat."""
    file, before, after, *_ = MUTANTS[defect]
    shaders = emulator.broken_shaders(folder, file, before, after)
    paths = [shaders / f"{stem}.metal" for stem in target(defect)[1]]
    for path in paths:
        lines = path.read_text().splitlines(keepends=True)
        unneeded = re.compile(r"ONEBIT_INSTANTIATE.*bfloat")
        path.write_text("".join(line for line in lines if not unneeded.match(line)))
    return str(emulator.build(paths))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folders = {defect: tmp_path_factory.mktemp("mutant") for defect in MUTANTS}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(folders, pool.map(broken, folders.values(), folders), strict=True))


@pytest.mark.parametrize("defect", MUTANTS)
def test_a_defect_in_a_kernel_fails_the_selftest(defect, libraries, monkeypatch):
    monkeypatch.setenv("ONEBIT_EMULATOR", libraries[defect])
    monkeypatch.setenv("ONEBIT_FAKE_GPU", M5 if "_tensor:" in defect else M1)
    assert finds_a_defect(target(defect)[0])


def finds_a_defect(name: str, dtypes=(torch.float32, torch.float16)) -> bool:
    """Does a row of these fail, or its kernel stop?"""
    torch.manual_seed(0)
    chosen = [c for c in cases.checks("mps") if c.kernel.startswith(name) and c.dtype in dtypes]
    assert chosen
    for check in chosen:
        try:
            if not check.run().passed:
                return True
        except RuntimeError as error:
            assert "is missing" not in str(error), error
            return True
    return False


@pytest.mark.parametrize(
    "name", ["qmv", "qmm", "qvm", "qmm_n", "decode", "quantize", "affine_grad"]
)
def test_a_kernel_that_is_aborted_fails_the_selftest(name, monkeypatch):
    """Its results then are what was in their memory, which PyTorch hands out again."""
    monkeypatch.setenv("ONEBIT_FAKE_RECYCLED_MEMORY", "1")
    first = next(c for c in cases.checks("mps") if c.kernel.startswith(name))
    torch.manual_seed(0)
    assert first.run().passed
    monkeypatch.setenv("ONEBIT_FAKE_ABORTED", "1")
    torch.manual_seed(0)
    assert not first.run().passed


def test_a_report_tunes_the_rules(tmp_path, monkeypatch, capsys):
    path = tmp_path / "report.json"
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    monkeypatch.setattr(speed, "SIZE", 128)
    monkeypatch.setattr(speed, "TURN_BYTES", 1 << 12)
    monkeypatch.setattr(report, "MEASURED", [(True, "qmv_wide", (4,)), (True, "qmm", (4, 9))])
    log()
    report.write_report(str(path), "a machine", [cases.Row("qmv", torch.float16, 2, 1)], seconds=0)
    assert {"qmv_wide_half_4", "qmm_half_32", "qmm_float"} <= set(kernels_of(log()))
    found = json.loads(path.read_text())
    assert found["gpu"] == {"family": 7, "cores": 7, "tensor_operations": False}
    assert [found["rules"][s["rule"]]["kernel"] for s in found["speeds"]] == [
        *("qmv_wide", "qmv_wide", "qmm")
    ] * 3
    torch.ops.onebit.qmm(torch.ones(4, 128, device="mps"), *weights(8, 128), 128)
    assert kernels_of(log()) == ["qmv_wide_float_4"]  # nothing is forced any more

    for s, microseconds in zip(found["speeds"], [3.0, 2.0, 5.0] * 3, strict=True):
        s["microseconds"] = microseconds
    path.write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["tune_metal.py", str(path)])
    runpy.run_path(str(ROOT / "benchmarks/tune_metal.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == [
        "a machine: family 7, 7 cores",
        "checks that failed: qmv",
        "x . w^T, 4 rows: qmv_wide takes 50% longer than qmm",
        "    {true, 7, kAnyM, Kernel::kQmm},",
    ]


def test_a_kernel_that_does_not_exist_cannot_be_forced():
    with pytest.raises(ValueError, match=r"kernel must be one of launch_plan\.h, got qmw"):
        torch.ops.onebit.mps_force_kernel("qmw")
