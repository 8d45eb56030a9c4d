"""Builds csrc/mps, the real files, for Linux on the fake Metal; gives torch an "mps" device."""

import os
import subprocess
import sys
from pathlib import Path

import emulator
import toolchain
import torch

sys.path.insert(0, str(toolchain.SHADERS))
import embed

HOST = toolchain.HERE / "host"
HEADERS = toolchain.HERE / "headers"
TORCH = Path(torch.__file__).parent


def compiler(language: str) -> list[str]:
    """clang of the ziglang wheel with the system's libstdc++, which Linux torch is built with."""
    machine = os.uname().machine
    gcc = subprocess.run(["g++", "-print-file-name="], capture_output=True, text=True).stdout
    return [
        *(toolchain.zig(), "clang", f"--target={machine}-linux-gnu", "-x", language),
        *("-idirafter", toolchain.zig_include(), f"--gcc-install-dir={Path(gcc.strip())}"),
        *("-std=c++20", "-O1", "-g1", "-fPIC", "-fblocks", "-fobjc-runtime=gcc", "-w"),
        *("-DONEBIT_EMULATED_METAL", f"-I{toolchain.cache_directory() / 'generated'}"),
        *("-isystem", str(HEADERS / "linux"), "-isystem", str(HEADERS / "apple")),
        *("-isystem", str(TORCH / "include")),
    ]


def inputs() -> list[Path]:
    """Everything an object may include besides torch."""
    folders = [toolchain.ROOT / "csrc", toolchain.ROOT / "csrc/mps", toolchain.SHADERS, HOST]
    folders += [p for p in HEADERS.rglob("*") if p.is_dir()]
    return sorted(p for folder in folders for p in folder.glob("*.h"))


def write_shader_source() -> Path:
    """shader_source.h as setup.py generates it."""
    target = toolchain.cache_directory() / "generated" / "shader_source.h"
    target.parent.mkdir(exist_ok=True)
    text = embed.header(toolchain.SHADERS)
    if not target.exists() or target.read_text() != text:
        target.write_text(text)
    return target


def build() -> Path:
    generated = write_shader_source()
    headers = [*inputs(), generated]
    mps = toolchain.ROOT / "csrc" / "mps"
    sources = sorted([*mps.glob("*.cpp"), *HOST.glob("*.cpp"), *mps.glob("*.mm"), *HOST.glob("*.mm")])
    objects = []
    for source in sources:
        language = "objective-c++" if source.suffix == ".mm" else "c++"
        command = [*compiler(language), f"-DTORCH={torch.__version__}"]
        objects.append(toolchain.object_file(source, command, headers))
    library = toolchain.cache_directory() / f"host-{toolchain.digest(*(o.name for o in objects))}.so"
    if not library.exists():
        scratch = library.with_name(f"{library.name}.{os.getpid()}")
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
        rpath = f"-Wl,-rpath,{TORCH / 'lib'}"
        toolchain.run(
            ["g++", "-shared", "-o", str(scratch), *map(str, objects), *libraries, rpath]
        )
        scratch.rename(library)
    return library


def load() -> None:
    """Registers the MPS kernels and the fake device with this process's torch; once."""
    if not hasattr(torch.ops.onebit_fake, "take_log"):
        shaders = sorted(toolchain.SHADERS.glob("*.metal"))
        os.environ["ONEBIT_EMULATOR"] = str(emulator.build(shaders, [toolchain.SHADERS]))
        torch.ops.load_library(build())
