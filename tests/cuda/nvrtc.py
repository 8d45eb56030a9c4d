"""NVIDIA's run-time compiler out of its wheel: it needs no GPU."""

import ctypes
import functools
import re
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path

ERRORS = "nvrtc must compile the kernel, got:\n"


@functools.cache
def library() -> ctypes.CDLL:
    found = {Path(f).name: f.locate() for f in files("nvidia-cuda-nvrtc") or []}
    path_of = lambda start: next(p for n, p in sorted(found.items()) if n.startswith(start))
    # Found by name once it is loaded; its folder is in no search path.
    ctypes.CDLL(str(path_of("libnvrtc-builtins.so")), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path_of("libnvrtc.so")))


@dataclass
class Kernel:
    registers: int
    spilled_bytes: int


@dataclass
class Program:
    log: str
    kernels: dict[str, Kernel]
    code: bytes


class CompileError(Exception):
    """The compiler refused; the message is its own."""


def machine_code(program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    library().nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    library().nvrtcGetCUBIN(program, code)
    return code.raw


def compile_program(text: str, architecture: str, options: tuple[str, ...]) -> Program:
    """Compile down to machine code, with the options of launcher.cpp; what ptxas says of it."""
    lib, program, size = library(), ctypes.c_void_p(), ctypes.c_size_t()
    assert lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"k.cu", 0, None, None) == 0
    base = ["--std=c++17", "-default-device", "--diag-suppress=177", "--ptxas-options=-v"]
    everything = [f"--gpu-architecture={architecture}", *base, *options]
    array = (ctypes.c_char_p * len(everything))(*(o.encode() for o in everything))
    result = lib.nvrtcCompileProgram(program, len(everything), array)
    lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, log)
    code = machine_code(program) if result == 0 else b""
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    if result != 0:
        raise CompileError(log.value.decode())
    kernels, name = {}, ""
    for line in log.value.decode().splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name = entry[1]
        if spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[name] = Kernel(0, int(spill[1]) + int(spill[2]))
        if used := re.search(r"Used (\d+) registers", line):
            kernels[name].registers = int(used[1])
    return Program(log.value.decode(), kernels, code)
