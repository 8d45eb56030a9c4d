"""Builds torch_onebit._C, the operators, and says in the package's metadata for which torch.

Everything else about the package is in pyproject.toml.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import setuptools
from setuptools import setup

if int(setuptools.__version__.partition(".")[0]) < 77:  # it would not understand pyproject.toml
    raise SystemExit(
        f"torch_onebit needs setuptools 77 or newer to build, and {setuptools.__version__} was "
        "found.\n"
        "    pip install 'setuptools>=77'\n"
        "    pip install --no-build-isolation .\n"
    )
try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "torch_onebit is compiled against the torch you will run it with, and no torch was found.\n"
        "Install torch first, then build in the same environment:\n"
        "    pip install torch ninja 'setuptools>=77'\n"
        "    pip install --no-build-isolation .\n"
    ) from error

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))
import embed  # noqa: E402


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def generated(name: str, text: str) -> str:
    """Write a header into the build folder, whose path is returned."""
    folder = ROOT / "build" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    header = folder / name
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return str(folder)


def cuda_include() -> str:
    """The folder of cuda.h: of the packages that torch depends on, or of a CUDA toolkit."""
    needed = ("cuda.h", "nvrtc.h", "crt/host_defines.h")
    site = Path(torch.__file__).parents[1]
    found = sorted(site.glob("nvidia/*/include/cuda_runtime_api.h"))
    toolkit = Path(CUDA_HOME or "/usr/local/cuda") / "include" / "cuda_runtime_api.h"
    for header in [*found, toolkit]:
        if all((header.parent / name).exists() for name in needed):
            return str(header.parent)
    raise SystemExit(
        f"torch {torch.__version__} is built for CUDA, and no folder with cuda.h, "
        "nvrtc.h and crt/host_defines.h was found.\n"
        "Install the package nvidia-cuda-crt, which completes the headers of torch's own wheels, "
        "or a CUDA toolkit, and name that one by CUDA_HOME."
    )


def extension() -> CppExtension:
    compile_args = [
        "-std=c++20",  # which torch before 2.13 does not ask for
        # After CFLAGS, whose -O0 is meant: sanitizers and emulation would compile for ten minutes.
        "-O0" if "-O0" in os.environ.get("CFLAGS", "").split() else "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
    ]
    link_args = []
    files = sources("csrc/*.cpp", "csrc/ops/*/*.cpp", "csrc/cpu/**/*.cpp", "csrc/bench/*.cpp")
    include_dirs = []
    libraries = []
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
        include_dirs.append(generated("shader_source.h", embed.shader_header(ROOT / "metal")))
        # Apple's clang has OpenMP but no driver flag for it; omp.h comes with torch, and so does
        # the runtime, already loaded when the extension is.
        compile_args += [
            "-fobjc-arc",
            "-Xpreprocessor",
            "-fopenmp",
            "-Wno-unused-command-line-argument",
        ]
        link_args += ["-framework", "Metal", "-framework", "Foundation"]
    if torch.version.cuda:
        # Compiled by the host compiler alone: kernels are compiled on the user's machine, and the
        # driver and the run-time compiler are loaded from where torch has them.
        files += sources("csrc/cuda/*.cpp")
        header = generated(
            "kernel_source.h", embed.kernel_header(ROOT / "csrc" / "cuda" / "kernels")
        )
        include_dirs += [header, cuda_include()]
        libraries.append("c10_cuda")
    elif torch.version.hip:
        print("torch_onebit has no kernels for ROCm: its operators run as plain PyTorch there")
    return CppExtension(
        name="torch_onebit._C",
        sources=files,
        include_dirs=include_dirs,
        libraries=libraries,
        extra_compile_args={"cxx": compile_args},
        extra_link_args=link_args,
        py_limited_api=True,
    )


class BuildChecked(BuildExtension):
    """BuildExtension, which without a compiler ends in a hundred lines that do not say so."""

    def run(self) -> None:
        check_compiler(shlex.split(os.environ.get("CXX", "c++")))
        super().run()


def check_compiler(command: list[str]) -> None:
    """Compile and link a C++20 program, as torch's BuildExtension would call the compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <concepts>\nint main() { return std::same_as<int, long>; }\n")
        arguments = [*command, "-std=c++20", str(source), "-o", f"{folder}/probe"]
        try:
            found = subprocess.run(arguments, capture_output=True, text=True)
            reason = found.stderr.strip() if found.returncode else ""
        except OSError as error:
            reason = str(error)
    if reason:
        raise SystemExit(
            "torch_onebit needs a C++20 compiler to build its operators: install one (Debian and "
            "Ubuntu: apt install g++; macOS: xcode-select --install) or name it in CXX; "
            f"{shlex.join(command)} does not work: {reason.splitlines()[0]}"
        )


def requirements() -> list[str]:
    """The extension runs with the minor version of torch that it was built with, and no other."""
    minor = ".".join(torch.__version__.split(".")[:2])
    return [f"torch=={minor}.*", "numpy", "tqdm"]


def description() -> str:
    """The README as it reads on its own: relative links become names of files, pictures go."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^]]*\]\((?!https?:)[^)]*\)\n\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^]]*)\]\((?!https?:|#)([^)]*)\)", r"\1 (`\2`)", text)


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildChecked},
    install_requires=requirements(),
    long_description=description(),
    long_description_content_type="text/markdown",
    # The extension calls no Python: one wheel serves every version from 3.10 on.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
