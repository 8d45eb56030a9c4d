"""The shaders for an NVIDIA GPU: translated as for the emulator, compiled by NVRTC."""

import re
import sys
from pathlib import Path

import emulator
import toolchain
from msl.tokens import MslError
from msl.translate import Translator, _built_in, preprocess

sys.path.insert(0, str(toolchain.ROOT / "tests" / "cuda"))
import nvrtc

HERE = Path(__file__).parent
RUNTIME = ["scalar", "vector", "math", "simdgroup", "matrix", "tensor", "msl"]
# As the emulator: a product is rounded before it is added, subnormals stay.
OPTIONS = ("--fmad=false",)


def entries(unit: Translator) -> tuple[str, dict[str, str]]:
    """A __global__ function a kernel; its name by host_name."""
    lines, names = [], {}
    for number, (host_name, expression, _) in enumerate(unit.instances):
        parameters = unit.kernels[re.match(r"\w+", expression).group()].parameters
        sources = [
            f"emu::BufferIndex{{{p.index}}}" if p.attribute == "buffer" else _built_in(p.attribute)
            for p in parameters
        ]
        names[host_name] = f"emu_entry_{number}"
        call = ", ".join([f"&{expression}", *sources])
        lines.append(f'extern "C" __global__ void {names[host_name]}() {{ emu::call({call}); }}')
    return "\n".join(lines), names


def without_includes(text: str) -> str:
    return re.sub(r"^#(pragma once|include .*)$", "", text, flags=re.MULTILINE)


def source() -> tuple[str, dict[str, str], dict[str, int]]:
    """One text of all kernels, their entry functions, and the indices of function constants."""
    shaders = sorted(toolchain.SHADERS.glob("*.metal"))
    merged = "".join(f'#include "{s.resolve()}"\n' for s in shaders)
    umbrella = toolchain.cache_directory() / f"umbrella-{toolchain.digest(merged)}.metal"
    unit = Translator(preprocess(toolchain.put(umbrella, merged), [toolchain.SHADERS]))
    body = unit.translate()
    table, names = entries(unit)
    if unit.errors:
        raise MslError("\n".join(unit.errors))
    runtime = [without_includes((emulator.RUNTIME / f"{h}.h").read_text()) for h in RUNTIME]
    head = (HERE / "machine.cuh").read_text()
    constants = {name: int(index) for name, index in unit.function_constants}
    return "\n".join([head, *runtime, body, table]), names, constants


def compile_for(architecture: str, text: str, *options: str) -> nvrtc.Program:
    return nvrtc.compile_program(text, architecture, (*OPTIONS, *options))
