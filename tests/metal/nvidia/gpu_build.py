"""The shaders for an NVIDIA GPU: translated as for the emulator, compiled by NVRTC."""

import re
import sys
from pathlib import Path

import emulator
import toolchain
from msl.translate import Translator, calls

sys.path.insert(0, str(toolchain.ROOT / "tests" / "cuda"))
import nvrtc

HERE = Path(__file__).parent
RUNTIME = ["scalar", "vector", "math", "simdgroup", "matrix", "tensor", "msl"]
# As the emulator: a product is rounded before it is added, subnormals stay.
OPTIONS = ("--fmad=false",)


def without_includes(text: str) -> str:
    return re.sub(r"^#(pragma once|include .*)$", "", text, flags=re.MULTILINE)


def source() -> tuple[str, dict[str, str], dict[str, int]]:
    """One text of all kernels; their __global__ functions, and the indices of function constants,
    by name."""
    names = {}

    def entries(unit: Translator) -> str:
        lines = []
        for number, (host_name, _, call) in enumerate(calls(unit)):
            names[host_name] = f"emu_entry_{number}"
            lines.append(f'extern "C" __global__ void {names[host_name]}() {{ {call} }}')
        return "\n".join(lines)

    shaders = sorted(toolchain.SHADERS.glob("*.metal"))
    unit, body = emulator.translated(shaders, [toolchain.SHADERS], (), entries)
    runtime = [without_includes((emulator.RUNTIME / f"{h}.h").read_text()) for h in RUNTIME]
    head = (HERE / "machine.cuh").read_text()
    constants = {name: int(index) for name, index in unit.function_constants}
    return "\n".join([head, *runtime, body]), names, constants


def compile_for(architecture: str, text: str, *options: str) -> nvrtc.Program:
    return nvrtc.compile_program(text, architecture, (*OPTIONS, *options))
