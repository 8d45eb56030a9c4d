"""Makes texts of the GPU kernels: they are compiled on the user's machine at first use."""

import re
from pathlib import Path

_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)


def inline(paths: list[Path]) -> str:
    """The files one after the other, with each header they include put in once."""
    seen: set[Path] = set()

    def text_of(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        text = path.read_text(encoding="ascii").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda m: text_of((path.parent / m.group(1)).resolve()), text)

    return "".join(text_of(path.resolve()) for path in paths)


def shader_source(folder: Path) -> str:
    """All ``*.metal`` of ``folder`` as one program."""
    return inline(sorted(folder.glob("*.metal")))


def shader_header(folder: Path) -> str:
    """A C++ header that defines ``kShaderSource``."""
    return (
        "// Generated from metal/ by csrc/embed.py.\n#pragma once\n"
        "namespace onebit::mps {\n"
        f'constexpr const char* kShaderSource = R"onebit({shader_source(folder)})onebit";\n'
        "}  // namespace onebit::mps\n"
    )


def kernel_sources(folder: Path) -> dict[str, str]:
    """Each ``*.cu`` of ``folder`` as a program, by its name."""
    return {path.stem: inline([path]) for path in sorted(folder.glob("*.cu"))}


def kernel_header(folder: Path) -> str:
    """A C++ header that defines ``kKernelSources``."""
    rows = "".join(
        f'    {{"{name}", R"onebit({text})onebit"}},\n'
        for name, text in kernel_sources(folder).items()
    )
    return (
        "// Generated from csrc/cuda/kernels by csrc/embed.py.\n#pragma once\n"
        "namespace onebit::cuda {\n"
        "struct KernelSource {\n  const char *name, *text;\n};\n"
        f"constexpr KernelSource kKernelSources[] = {{\n{rows}}};\n"
        "}  // namespace onebit::cuda\n"
    )
