"""Builds .metal files into a library that runs their kernels on the CPU, and dispatches them."""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import toolchain
from msl.tokens import MslError
from msl.translate import Translator, entries, preprocess

RUNTIME = toolchain.HERE / "runtime"
# -fsanitize=thread makes every load and store call a hook; the hooks are ours (memory.cpp).
KERNEL_FLAGS = [
    *(
        "g++",
        "-std=c++17",
        "-O1",
        "-g1",
        "-gdwarf-4",
        "-fPIC",
        "-w",
    ),
    *("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"),
]
if "x86" in os.uname().machine:
    KERNEL_FLAGS += ["-mfma", "-fexpensive-optimizations"]  # -O1 alone fuses nothing
RUNTIME_FLAGS = ["g++", "-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-fvisibility=hidden"]
FORWARD, REVERSE, RANDOM = range(3)


class EmulatorError(Exception):
    """A kernel did what it must not; the message says where."""


class Buffer(ctypes.Structure):
    _fields_ = [
        ("host", ctypes.c_void_p),
        ("length", ctypes.c_uint64),
        ("read_only", ctypes.c_int32),
        ("initialised", ctypes.c_int32),
        ("offset", ctypes.c_uint64),
        ("bytes_read", ctypes.c_uint64),
        ("bytes_missed", ctypes.c_uint64),
        ("unwritten", ctypes.c_int64),
    ]


class Dispatch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("groups", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("buffers", Buffer * 31),
        ("schedule", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("count_traffic", ctypes.c_int32),
        ("flush_denormals", ctypes.c_int32),
        ("bank_cycles", ctypes.c_uint64),
        ("bank_least", ctypes.c_uint64),
    ]


def translated(
    sources: list[Path],
    include: list[Path],
    defines: tuple[str, ...],
    entries: Callable[[Translator], str],
) -> tuple[Translator, str]:
    """All kernels in `sources` as C++, followed by what `entries` makes of them."""
    merged = "".join(f'#include "{s.resolve()}"\n' for s in sources)
    umbrella = toolchain.cache_directory() / f"umbrella-{toolchain.digest(merged)}.metal"
    unit = Translator(preprocess(toolchain.put(umbrella, merged), include, defines))
    body = unit.translate() + "\n" + entries(unit)
    if unit.errors:
        raise MslError("\n".join(unit.errors))
    return unit, body


def build(sources: list[Path], include: list[Path] = (), defines: tuple[str, ...] = ()) -> Path:
    """One shared library of all kernels in `sources`; cached by content."""
    unit, body = translated(sources, list(include), defines, entries)
    # Apple's compiler fuses a * b + c where the source does not forbid it, and so does this one.
    contract = "fast" if unit.contracts else "off"
    return link(f'#include "msl.h"\n{body}', [f"-ffp-contract={contract}"])


def link(body: str, flags: list[str], folders: tuple[Path, ...] = ()) -> Path:
    """A library of kernels that are C++ by now, and of the runtime in RUNTIME and `folders`."""
    cache = toolchain.cache_directory()
    folders = (RUNTIME, *folders)
    headers = sorted(h for f in folders for h in f.glob("*.*h"))
    flags = [*flags, *(f"-I{f}" for f in folders)]
    cpp = toolchain.put(cache / f"kernels-{toolchain.digest(body)}.cpp", body)
    objects = [toolchain.object_file(cpp, [*KERNEL_FLAGS, *flags], headers)]
    for source in sorted(s for f in folders for s in f.glob("*.cpp")):
        include = [f"-I{f}" for f in folders if source.parent in folders[1:]]
        objects.append(toolchain.object_file(source, [*RUNTIME_FLAGS, *include], headers))
    library = cache / f"emulator-{toolchain.digest(*(o.name for o in objects))}.so"
    if not library.exists():
        scratch = library.with_name(f"{library.name}.{os.getpid()}")
        toolchain.run(["g++", "-shared", "-o", str(scratch), *map(str, objects)])
        scratch.rename(library)
    return library


def broken_shaders(folder: Path, file: str, before: str, after: str) -> Path:
    """A copy of our shaders with one change, and of the headers they share with the host."""
    shaders = Path(shutil.copytree(toolchain.SHADERS, folder / "metal"))
    ignored = shutil.ignore_patterns("*.cpp")
    shutil.copytree(toolchain.ROOT / "csrc", folder / "csrc", ignore=ignored)
    text = (shaders / file).read_text()
    assert before in text
    (shaders / file).write_text(text.replace(before, after))
    return shaders


class Library:
    def __init__(self, sources: list[Path], include: list[Path] = (), defines=()):
        self._open(build(sources, include, defines))

    def _open(self, path: Path) -> None:
        self.path = path
        self._c = ctypes.CDLL(str(self.path))
        self._c.emu_kernel_name.restype = ctypes.c_char_p
        # of the last dispatch: bytes read by buffer, those that the L1 did not have, and how many
        # times the cycles of no bank conflict threadgroup memory took
        self.traffic: dict[int, int] = {}
        self.missed: dict[int, int] = {}
        self.conflicts = 0.0

    def kernels(self) -> list[str]:
        names = []
        while name := self._c.emu_kernel_name(len(names)):
            names.append(name.decode())
        return names

    def set_constant(self, index: int, value: np.generic) -> None:
        data = np.array(value)
        found = self._c.emu_set_function_constant(
            index, ctypes.c_void_p(data.ctypes.data), ctypes.c_uint64(data.nbytes)
        )
        if found <= 0:
            raise EmulatorError(f"function constant {index} of {data.nbytes} bytes: {found} found")

    def run(
        self,
        kernel: str,
        inputs: dict[int, np.ndarray],
        outputs: dict[int, np.ndarray],
        groups: tuple[int, ...],
        threads: tuple[int, ...],
        schedule: int = FORWARD,
        seed: int = 1,
        offsets: dict[int, int] | None = None,
        count_traffic: bool = False,
        flush_denormals: bool = False,
        updates: dict[int, np.ndarray] | None = None,
        late: tuple[int, ...] = (),
    ) -> None:
        """Runs one dispatch.

        `outputs` start uninitialised and must be written in full; `updates` are read and written;
        `late` inputs nobody may read until the kernel has waited for what makes them.
        """
        d = Dispatch(kernel=kernel.encode(), schedule=schedule, seed=seed)
        d.count_traffic, d.flush_denormals = count_traffic, flush_denormals
        d.groups[:] = [*groups, 1, 1][:3]
        d.threads[:] = [*threads, 1, 1][:3]
        kinds = ((1, 1, inputs), (0, 0, outputs), (0, 1, updates or {}))
        for read_only, initialised, arrays in kinds:
            for index, array in arrays.items():
                if not array.flags.c_contiguous:
                    raise ValueError(f"buffer {index} must be contiguous")
                offset = (offsets or {}).get(index, 0)
                d.buffers[index] = Buffer(
                    array.ctypes.data,
                    array.nbytes,
                    read_only,
                    2 if index in late else initialised,
                    offset,
                )
        message = ctypes.create_string_buffer(4096)
        if self._c.emu_run(ctypes.byref(d), message, ctypes.c_uint64(4096)):
            raise EmulatorError(self._with_line(message.value.decode()))
        self.traffic = {i: d.buffers[i].bytes_read for i in inputs}
        self.missed = {i: d.buffers[i].bytes_missed for i in inputs}
        self.conflicts = d.bank_cycles / max(d.bank_least, 1)
        for index in outputs:
            if missing := d.buffers[index].unwritten:
                raise EmulatorError(f"{kernel}: {missing} bytes of buffer({index}) never written")

    def _with_line(self, message: str) -> str:
        return with_line(message, self.path)


def with_line(message: str, library: Path) -> str:
    """Replaces the pc of an emulator message by file:line of the shader."""

    def lookup(match: re.Match) -> str:
        base = next(
            int(line.split("-")[0], 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
            if str(library) in line
        )
        address = hex(int(match.group(1), 16) - base - 1)
        command = ["addr2line", "-i", "-e", str(library), address]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        shader = [f for f in lines if "/runtime/" not in f and "?" not in f]
        return f"at {shader[0].split(' ')[0]}" if shader else match.group()

    return re.sub(r"pc=(0x[0-9a-f]+)", lookup, message)
