"""Repeats on an NVIDIA GPU what the emulated Metal did, and compares every byte that was written.

``python tests/metal/nvidia/replay.py FOLDER``, of a folder that gpu_trace.py wrote; it needs
nothing but the driver, so that compute-sanitizer can watch it.
"""

import ctypes
import functools
import json
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

EXCHANGED = 2048  # bytes of shared memory a warp, as in machine.cuh


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def call(name: str, *arguments) -> None:
    status = getattr(driver(), name)(*arguments)
    if status != 0:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise SystemExit(f"{name}: {(text.value or b'?').decode()}")


@dataclass
class Buffer:
    index: int
    length: int
    read_only: bool
    initialised: bool
    offset: int
    before: bytes = b""
    after: bytes = b""


@dataclass
class Dispatch:
    kernel: str
    groups: list[int]
    threads: list[int]
    constants: dict[int, bytes]
    buffers: list[Buffer]


def read_dispatches(path: Path) -> Iterator[Dispatch]:
    with path.open("rb") as file:
        while head := file.read(8):
            d = json.loads(file.read(struct.unpack("<Q", head)[0]))
            constants = {int(i): bytes.fromhex(value) for i, value in d["constants"].items()}
            buffers = [Buffer(*fields) for fields in d["buffers"]]
            for b in buffers:
                b.before = file.read(b.length)
            for b in buffers:
                b.after = file.read(b.length) if file.read(1) != b"\0" else b.before
            yield Dispatch(d["kernel"], d["groups"], d["threads"], constants, buffers)


class Gpu:
    def __init__(self, folder: Path):
        context, device = ctypes.c_void_p(), ctypes.c_int()
        call("cuInit", 0)
        call("cuDeviceGet", ctypes.byref(device), 0)
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        call("cuCtxSetCurrent", context)
        self.module = ctypes.c_void_p()
        code = (folder / "shaders.cubin").read_bytes()
        call("cuModuleLoadData", ctypes.byref(self.module), code)
        names = json.loads((folder / "names.json").read_text())
        self.kernels, self.constants = names["kernels"], names["constants"]

    def write_symbol(self, name: str, data: bytes) -> None:
        address, size = ctypes.c_uint64(), ctypes.c_size_t()
        symbol = name.encode()
        call("cuModuleGetGlobal_v2", ctypes.byref(address), ctypes.byref(size), self.module, symbol)
        call("cuMemcpyHtoD_v2", address, data, ctypes.c_size_t(len(data)))

    def run(self, d: Dispatch) -> list[bytes]:
        """What the buffers hold afterwards."""
        for name, index in self.constants.items():
            if index in d.constants:
                self.write_symbol(name, d.constants[index])
        allocated, addresses, lengths = {}, [0] * 31, [0] * 31
        for b in d.buffers:
            memory, shift = ctypes.c_uint64(), b.offset % 256
            call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(b.length + shift))
            allocated[b.index] = memory
            addresses[b.index], lengths[b.index] = memory.value + shift, b.length
            if b.initialised:  # else compute-sanitizer's initcheck tells what reads it
                self.copy_in(addresses[b.index], b.before)
        self.write_symbol("_ZN3emu8bindingsE", struct.pack("<62Q", *addresses, *lengths))
        function = ctypes.c_void_p()
        name = self.kernels[d.kernel].encode()
        call("cuModuleGetFunction", ctypes.byref(function), self.module, name)
        warps = -(-int(np.prod(d.threads)) // 32)
        shared = warps * EXCHANGED
        call("cuFuncSetAttribute", function, 8, shared)  # the most dynamic shared memory
        none = ctypes.c_void_p()
        call("cuLaunchKernel", function, *d.groups, *d.threads, shared, none, none, none)
        call("cuCtxSynchronize")
        found = []
        for b in d.buffers:
            out = ctypes.create_string_buffer(b.length)
            address = ctypes.c_uint64(addresses[b.index])
            call("cuMemcpyDtoH_v2", out, address, ctypes.c_size_t(b.length))
            found.append(out.raw)
        for memory in allocated.values():
            call("cuMemFree_v2", memory)
        return found

    def copy_in(self, address: int, data: bytes) -> None:
        call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)))


def main() -> None:
    folder = Path(sys.argv[1])
    gpu, ran, different = Gpu(folder), Counter(), Counter()
    for d in read_dispatches(folder / "dispatches"):
        found = gpu.run(d)
        ran[d.kernel] += 1
        for b, bytes_now in zip(d.buffers, found, strict=True):
            if bytes_now != b.after:
                different[d.kernel] += 1
                a, e = (np.frombuffer(t, np.uint8) for t in (bytes_now, b.after))
                where = np.flatnonzero(a != e)
                print(
                    f"{d.kernel} {d.groups} {d.threads}: {len(where)} of {b.length} bytes of "
                    f"buffer {b.index} differ, the first at {where[0]}"
                )
    print(f"{sum(ran.values())} dispatches of {len(ran)} kernels, {sum(different.values())} differ")
    missing = sorted(set(gpu.kernels) - set(ran))
    if missing:
        print("not run:", *missing)
    sys.exit(bool(different or missing))


if __name__ == "__main__":
    main()
