"""Every kernel compiles for every architecture, without a GPU; the hot ones spill nothing."""

import sys
from dataclasses import dataclass

import nvrtc
import plans
import pytest

sys.path.insert(0, str(plans.HERE.parents[1] / "csrc"))
import embed

SOURCES = embed.kernel_sources(plans.HERE.parents[1] / "csrc" / "cuda" / "kernels")


@dataclass
class Hot:
    why: str
    launch: plans.Launch
    registers: int  # the most it may take on sm_90a
    spilled_bytes: int  # the most, stored and loaded


def hot(why, registers, m, n=14336, k=4096, spilled_bytes=0, **options) -> Hot:
    return Hot(why, plans.product(m, n, k, **options).launches[-1], registers, spilled_bytes)


# What the plan compiles for an H100, and registers: blocks in flight are 65536 / (threads * them).
HOT = [
    hot("one row", 48, 1),
    hot("four rows", 64, 4, spilled_bytes=16),
    hot("one row, float32", 64, 1, x="float"),
    # 128 registers let a fourth block in: worth more than what it spills once a group.
    hot("8 rows, wide", 128, 8, spilled_bytes=100),
    hot("8 rows, few outputs", 112, 8, n=4096),
    hot("16 rows, ragged groups", 240, 16, k=4064, group_size=32),
    hot("8 rows, groups of 32", 128, 8, group_size=32),
    hot("8 rows, float32", 168, 8, x="float"),
    hot("8 rows, ragged groups", 128, 8, n=4096, k=4064, group_size=32),
    hot("32 rows", 168, 32),
    hot("64 rows", 168, 64),
    hot("64 rows, groups of 32", 168, 64, group_size=32),
    hot("128 rows", 168, 128),
    hot("512 rows", 168, 512),
    hot("512 rows, levels of another dtype", 168, 512, levels="half", biases=False),
    hot("512 rows, groups of 32", 168, 512, group_size=32),
]


@pytest.mark.parametrize("case", HOT, ids=[case.why for case in HOT])
def test_hot_kernel_fits_its_registers(case):
    program = nvrtc.compile_program(SOURCES[case.launch.source], "sm_90a", case.launch.options)
    kernel = program.kernels[case.launch.kernel]
    assert kernel.spilled_bytes <= case.spilled_bytes
    assert kernel.registers <= case.registers
    assert "serialized" not in program.log  # wgmma that waits for itself


def test_float_products_of_many_rows_spill_nothing():
    launch = plans.product(512, 4096, 4096, x="float").launches[-1]
    program = nvrtc.compile_program(SOURCES[launch.source], "sm_90a", launch.options)
    assert program.kernels["wgmma"].spilled_bytes == 0
    assert "serialized" not in program.log


# Each source once, in the form with most code.
EVERYWHERE = [
    plans.rows("quantize", 8, x="half", group_size=64),
    plans.rows("decode", 8, other="float", levels="half", group_size=32),
    plans.product(13, 70, 640, gpu=(80, 108), x="half", levels="float").launches[-1],
    plans.product(5, 70, 160, gpu=(80, 108), x="float", group_size=32).launches[-1],
    plans.product(100, 70, 640, gpu=(80, 108), x="half", levels="float").launches[-1],
    plans.product(3, 64, 64, transpose=False, indexed=True, group_size=64).launches[-1],
    plans.rows("affine_grad", 8, group_size=64),
    plans.rows("quantize_levels", 8, group_size=32, rule=3, importance=True),
    plans.rows("fake_quantize_backward", 8, group_size=64, rule=2, other="half"),
    plans.rows("fake_quantize_affine", 8, rule=0, x="half", levels="float"),
    plans.rows("flip_bits", 8),
]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100", "sm_120"])
def test_every_source_compiles(architecture):
    for launch in EVERYWHERE:
        program = nvrtc.compile_program(SOURCES[launch.source], architecture, launch.options)
        assert launch.kernel in program.kernels
    covered = {launch.source for launch in EVERYWHERE}
    assert covered == SOURCES.keys() - {"b1", "wgmma"}


# Rows of x, group size, the most registers: 65536 / 512 let a second block in.
TILES = [(32, 128, 128), (64, 128, 128), (128, 128, 208), (128, 32, 255)]


@pytest.mark.parametrize("architecture", [80, 89, 100, 120])
def test_tiles_spill_nothing_on_any_gpu_that_takes_them(architecture):
    for m, group_size, registers in TILES:
        gpu = (architecture, 100)
        launch = plans.product(m, 14336, 4096, gpu=gpu, group_size=group_size).launches[-1]
        assert launch.kernel == "tiles"
        program = nvrtc.compile_program(SOURCES["tiles"], f"sm_{architecture}", launch.options)
        assert program.kernels["tiles"].spilled_bytes == 0
        assert program.kernels["tiles"].registers <= registers


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89"])
def test_bits_meet_bits_where_that_is_one_instruction(architecture):
    launch = plans.product(2, 64, 512, gpu=(int(architecture[3:]), 60)).launches[-1]
    assert launch.kernel == "b1"
    nvrtc.compile_program(SOURCES["b1"], architecture, launch.options)


def test_a_kernel_that_does_not_compile_is_an_error():
    with pytest.raises(nvrtc.CompileError, match="undeclared"):
        nvrtc.compile_program("__global__ void f() { undeclared(); }", "sm_90a", ())


def test_sources_are_ascii_and_whole():
    for text in SOURCES.values():
        assert text.isascii()
        assert '#include "' not in text
        assert text.count("struct ProductArgs {") == 1
