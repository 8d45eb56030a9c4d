"""Builds torch_onebit._C, the operators. Everything else about the package is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "torch_onebit is compiled against the torch you will run it with, and no torch was found.\n"
        "Install torch first, then build in the same environment:\n"
        "    pip install torch\n"
        "    pip install --no-build-isolation .\n"
    ) from error

ROOT = Path(__file__).parent


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def extension() -> CppExtension:
    compile_args = ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    link_args = []
    if sys.platform == "linux":
        # Compiled with OpenMP, linked without: the runtime torch ships is already loaded, and a
        # second one would start its own threads.
        compile_args += ["-fopenmp"]
        link_args += ["-Wl,--no-undefined-version"]
    return CppExtension(
        name="torch_onebit._C",
        sources=sources("csrc/*.cpp", "csrc/cpu/*.cpp"),
        extra_compile_args={"cxx": compile_args},
        extra_link_args=link_args,
        py_limited_api=True,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
