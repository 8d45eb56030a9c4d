"""Builds a .cu file as a plan compiles it; launches its kernels on the emulator of tests/metal."""

import ctypes
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plans

sys.path.insert(0, str(plans.HERE.parent / "metal"))
import emulator

KERNELS = plans.HERE.parents[1] / "csrc" / "cuda" / "kernels"
RUNTIME = plans.HERE / "runtime"
SHARED_BYTES = 227 * 1024  # of a block, on sm_90
INCLUDE = re.compile(r'#include "([^"]+)"')
KERNEL = re.compile(r"(\w+)\(const __grid_constant__ (\w+) p\)")
SHARED = re.compile(r"(?<!extern )__shared__ (\w+) ([^;]+);")
DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?uint8_t (\w+)\[\];")


def text_of(path: Path, changes: dict[str, tuple[str, str]], seen: set[Path]) -> str:
    """The file with each header put in once and lines as they were; instructions.cuh is ours."""
    seen.add(path)
    ours = RUNTIME / path.name if path.name == "instructions.cuh" else path
    text = ours.read_text().replace("#pragma once\n", "\n")
    if path.name in changes:
        before, after = changes[path.name]
        assert text.count(before) == 1, f"{before!r} is in {path.name} {text.count(before)} times"
        text = text.replace(before, after)
    lines = [f'#line 1 "{ours}"']
    for number, line in enumerate(text.split("\n"), 1):
        include = INCLUDE.match(line)
        if not include:
            lines.append(line)
            continue
        header = (path.parent / include[1]).resolve()
        if header not in seen:
            lines.append(text_of(header, changes, seen))
        lines.append(f'#line {number + 1} "{ours}"')
    return "\n".join(lines)


def in_shared(match: re.Match) -> str:
    """`__shared__ T a[n], b;` as references to memory that the emulator owns."""
    element, declarators = match.groups()
    extents = [re.match(r"(\w+)((?:\[[^\]]*\])*)$", d) for d in declarators.split(", ")]
    return " ".join(
        f'auto& {d[1]} = emu::shared<{element}{d[2]}>("{d[1]}", [] {{}});' for d in extents
    )


class Kernels(emulator.Library):
    """The kernels of one source, compiled with the options of a launch.

    `changes` replace a text of a file: {"b1.cu": (before, after)}.
    """

    def __init__(self, source: Path, options: tuple[str, ...], changes: dict | None = None):
        text = text_of(source, changes or {}, set())
        text = DYNAMIC.sub(r'uint8_t* \1 = emu::dynamic_shared("\1");', SHARED.sub(in_shared, text))
        table = []
        self.arguments = dict(KERNEL.findall(text))
        for i, (kernel, argument) in enumerate(self.arguments.items()):
            text += f"\nstatic void emu_entry_{i}() {{ emu::call<const {argument}>({kernel}); }}"
            table.append(f'{{"{kernel}", emu_entry_{i}, 3u, {SHARED_BYTES}}}')
        rows = ", ".join([*table, "{nullptr, nullptr, 0}"])
        text += f'\nextern "C" const emu::KernelEntry emu_kernels[] = {{{rows}}};'
        text += '\nextern "C" const emu::FunctionConstant emu_function_constants[] = {{-1, 0, 0}};'
        defines = [o for o in options if o.startswith("-D")]
        contract = "off" if "--fmad=false" in options else "fast"
        flags = [*defines, f"-ffp-contract={contract}"]
        self._open(emulator.link(f'#include "cuda.h"\n{text}', flags, (RUNTIME,)))


@functools.cache
def kernels(source: Path, options: tuple[str, ...]) -> Kernels:
    return Kernels(source, options)


class TensorMap(ctypes.Structure):
    """As emu::Map: a tensor, the innermost size first, and the box of it that one copy brings."""

    _fields_ = [
        ("data", ctypes.c_uint64),
        ("rank", ctypes.c_uint64),
        ("element", ctypes.c_uint64),
        ("swizzle", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 4),
        ("strides", ctypes.c_uint64 * 3),
        ("box", ctypes.c_uint64 * 4),
        ("padding", ctypes.c_uint64),
    ]


SCALARS = {
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "TensorMap": TensorMap,
}


@functools.cache
def arguments() -> dict[str, type[ctypes.Structure]]:
    """The structs of params.h that kernels take."""
    text = re.sub(r"//.*", "", (KERNELS.parent / "params.h").read_text())
    structs = {}
    for name, body in re.findall(r"struct (\w+Args) \{(.*?)\};", text, re.DOTALL):
        fields = []
        for field in filter(None, (f.strip() for f in body.split(";"))):
            kind, names = re.match(r"((?:const )?\w+\*?) (.+)$", field).groups()
            ctype = ctypes.c_uint64 if "*" in kind else SCALARS[kind]
            fields += [(n, ctype) for n in names.split(", ")]
        if "TensorMap" in body:  # which is aligned to 64 bytes, and all of the struct with it
            used = sum(ctypes.sizeof(t) for _, t in fields)
            fields.append(("padding", ctypes.c_uint8 * (-used % 64)))
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs


@dataclass
class Map:
    """A pointer argument that is a tensor map."""

    array: np.ndarray
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


def launch(
    launch: plans.Launch,
    *,
    inputs: dict[str, np.ndarray | Map | None],
    outputs: dict[str, np.ndarray],
    numbers: dict[str, int],
    updates: dict[str, np.ndarray] | None = None,
    late: tuple[str, ...] = (),
    changes: dict | None = None,
    schedule: int = emulator.FORWARD,
    seed: int = 1,
) -> None:
    """One launch. Names are those of the argument's struct; what is not named is null or 0.

    `late` inputs come from the launch before, which may not have ended.
    """
    source = KERNELS / f"{launch.source}.cu"  # an absolute path stays one
    library = (
        Kernels(source, launch.options, changes) if changes else kernels(source, launch.options)
    )
    argument, pointers, buffers = arguments()[library.arguments[launch.kernel]](), [], {}
    for name, value in numbers.items():
        setattr(argument, name, value)
    everything = {**inputs, **outputs, **(updates or {})}
    for index, (name, value) in enumerate(everything.items(), 2):
        if value is None:
            continue
        pointers.append(getattr(type(argument), name).offset)
        if isinstance(value, Map):
            map_ = TensorMap(index, len(value.sizes), value.array.itemsize, value.swizzle)
            for field in ("sizes", "strides", "box"):
                getattr(map_, field)[: len(getattr(value, field))] = getattr(value, field)
            setattr(argument, name, map_)
        else:
            setattr(argument, name, index)
        buffers[name] = (index, value.array if isinstance(value, Map) else value)
    info = np.zeros(66, np.uint32)
    info[:2] = launch.shared_bytes, len(pointers)
    info[2 : 2 + len(pointers)] = pointers
    of = lambda names: {buffers[n][0]: buffers[n][1] for n in names if n in buffers}
    head = {0: np.frombuffer(bytes(argument), np.uint8), 1: info}
    library.run(
        launch.kernel,
        {**head, **of(inputs)},
        of(outputs),
        launch.grid,
        (launch.threads,),
        schedule,
        seed,
        updates=of(updates or {}),
        late=tuple(buffers[name][0] for name in late),
    )
