"""Builds csrc/mps, the real files, for Linux on the fake Metal; gives torch an "mps" device."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulator
import toolchain
import torch

sys.path.insert(0, str(toolchain.ROOT / "csrc"))
import embed

HOST = toolchain.HERE / "host"
HEADERS = toolchain.HERE / "headers"
TORCH = Path(torch.__file__).parent
# Family and cores of GPUs that the fake Metal plays, as ONEBIT_FAKE_GPU names them.
M1, M1_MAX, M3_MAX, M5 = "7:7", "7:32", "9:24", "10:10"
GPUS = (M1, M3_MAX, M5)  # every kernel is chosen on one of them


def compiler(language: str) -> list[str]:
    """clang of the ziglang wheel with the system's libstdc++, which Linux torch is built with."""
    machine = os.uname().machine
    gcc = subprocess.run(["g++", "-print-file-name="], capture_output=True, text=True).stdout
    return [
        *(toolchain.zig(), "clang", f"--target={machine}-linux-gnu", "-x", language),
        *("-idirafter", toolchain.zig_include(), f"--gcc-install-dir={Path(gcc.strip())}"),
        *("-std=c++20", "-O0", "-g1", "-fPIC", "-fblocks", "-fobjc-runtime=gcc", "-w"),
        "-DONEBIT_EMULATED_METAL",
        *("-isystem", str(HEADERS / "linux"), "-isystem", str(HEADERS / "apple")),
        *("-isystem", str(TORCH / "include")),
    ]


def inputs() -> list[Path]:
    """Everything an object may include besides torch."""
    csrc = toolchain.ROOT / "csrc"
    folders = [csrc, csrc / "ops", *(csrc / "ops").iterdir(), csrc / "mps", HOST]
    folders += [p for p in HEADERS.rglob("*") if p.is_dir()]
    return sorted(p for folder in folders for p in folder.glob("*.h"))


def embeds_shaders(source: Path) -> bool:
    return source.name == "encoder.mm"


def inputs_of(source: Path) -> list[Path]:
    return inputs() + ([write_shader_source()] if embeds_shaders(source) else [])


def include_of(source: Path) -> list[str]:
    """Where `source` finds its headers; only the encoder is compiled again for a new shader."""
    flags = [f"-I{toolchain.ROOT / 'csrc' / 'mps'}"]
    return flags + ([f"-I{write_shader_source().parent}"] if embeds_shaders(source) else [])


def write_shader_source() -> Path:
    """shader_source.h as setup.py generates it."""
    text = embed.shader_header(toolchain.SHADERS)
    folder = toolchain.cache_directory() / f"generated-{toolchain.digest(text)}"
    folder.mkdir(exist_ok=True)
    return toolchain.put(folder / "shader_source.h", text)


def build(encoder: Path | None = None) -> Path:
    """The library; with `encoder` in place of the real encoder.mm, for tests of broken ones."""
    mps = toolchain.ROOT / "csrc" / "mps"
    encoder = encoder or mps / "encoder.mm"
    sources = sorted([*mps.glob("*.cpp"), *HOST.glob("*.cpp"), encoder, *HOST.glob("*.mm")])

    def compile_one(source: Path) -> Path:
        language = "objective-c++" if source.suffix == ".mm" else "c++"
        command = [*compiler(language), f"-DTORCH={torch.__version__}", *include_of(source)]
        return toolchain.object_file(source, command, inputs_of(source))

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = (
        toolchain.cache_directory() / f"host-{toolchain.digest(*(o.name for o in objects))}.so"
    )
    if not library.exists():
        scratch = library.with_name(f"{library.name}.{os.getpid()}")
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
        rpath = f"-Wl,-rpath,{TORCH / 'lib'}"
        toolchain.run(["g++", "-shared", "-o", str(scratch), *map(str, objects), *libraries, rpath])
        scratch.rename(library)
    return library


def load(encoder: Path | None = None) -> None:
    """Registers the MPS kernels and the fake device with this process's torch; once."""
    if not hasattr(torch.ops.onebit_fake, "take_log"):
        shaders = sorted(toolchain.SHADERS.glob("*.metal"))
        os.environ["ONEBIT_EMULATOR"] = str(emulator.build(shaders, [toolchain.SHADERS]))
        torch.ops.load_library(build(encoder))
