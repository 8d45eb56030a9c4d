"""Builds torch_onebit._C, the operators. Everything else about the package is in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "torch_onebit is compiled against the torch you will run it with, and no torch was found.\n"
        "Install torch first, then build in the same environment:\n"
        "    pip install torch ninja 'setuptools>=77'\n"
        "    pip install --no-build-isolation .\n"
    ) from error

ROOT = Path(__file__).parent


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def shader_header() -> str:
    """Write the shaders into a header, compiled at first use, and return its folder."""
    sys.path.insert(0, str(ROOT / "metal"))
    import embed

    folder = ROOT / "build" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    text = embed.header(ROOT / "metal")
    header = folder / "shader_source.h"
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return str(folder)


def extension() -> CppExtension:
    compile_args = [
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
    ]
    link_args = []
    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    include_dirs = []
    if sys.platform == "linux":
        # Compiled with OpenMP, linked without: the runtime torch ships is already loaded, and a
        # second one would start its own threads.
        compile_args += ["-fopenmp"]
        link_args += ["-Wl,--no-undefined-version"]
    elif sys.platform == "darwin":
        # Metal 3.1, the first with bfloat, needs macOS 14; torch for Macs is arm64 only.
        os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", "14.0")
        os.environ.setdefault("ARCHFLAGS", "-arch arm64")
        files += sources("csrc/mps/*.cpp", "csrc/mps/*.mm")
        include_dirs.append(shader_header())
        # Apple's clang has OpenMP but no driver flag for it; omp.h comes with torch, and so does
        # the runtime, already loaded when the extension is.
        compile_args += [
            "-fobjc-arc",
            "-Xpreprocessor",
            "-fopenmp",
            "-Wno-unused-command-line-argument",
        ]
        link_args += ["-framework", "Metal", "-framework", "Foundation"]
    return CppExtension(
        name="torch_onebit._C",
        sources=files,
        include_dirs=include_dirs,
        extra_compile_args={"cxx": compile_args},
        extra_link_args=link_args,
        py_limited_api=True,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
