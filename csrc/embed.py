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


def shader_sources(folder: Path) -> dict[str, str]:
    """Each ``*.metal`` of ``folder`` as a program, by its name."""
    return {path.stem: inline([path]) for path in sorted(folder.glob("*.metal"))}


def shader_header(folder: Path) -> str:
    """A C++ header that defines ``kShaderSources``."""
    return header("metal/", "mps", "Shader", shader_sources(folder))


def kernel_sources(folder: Path) -> dict[str, str]:
    """Each ``*.cu`` of ``folder`` as a program, by its name."""
    return {path.stem: inline([path]) for path in sorted(folder.glob("*.cu"))}


def kernel_header(folder: Path) -> str:
    """A C++ header that defines ``kKernelSources``."""
    return header("csrc/cuda/kernels", "cuda", "Kernel", kernel_sources(folder))


def header(origin: str, backend: str, what: str, sources: dict[str, str]) -> str:
    rows = "".join(
        f'    {{"{name}", R"onebit({text})onebit"}},\n' for name, text in sources.items()
    )
    return (
        f"// Generated from {origin} by csrc/embed.py.\n#pragma once\n"
        f"namespace onebit::{backend} {{\n"
        f"struct {what}Source {{\n  const char *name, *text;\n}};\n"
        f"constexpr {what}Source k{what}Sources[] = {{\n{rows}}};\n"
        f"}}  // namespace onebit::{backend}\n"
    )
