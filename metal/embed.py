"""Makes one text of the shaders: the extension compiles it on the user's Mac at first use."""

import re
from pathlib import Path

_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)


def source(folder: Path) -> str:
    """All ``*.metal`` of ``folder`` with each header they include put in once."""
    seen: set[Path] = set()

    def inline(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        text = path.read_text(encoding="ascii").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda m: inline((path.parent / m.group(1)).resolve()), text)

    return "".join(inline(p.resolve()) for p in sorted(folder.glob("*.metal")))


def header(folder: Path) -> str:
    """A C++ header that defines ``kShaderSource``."""
    text = source(folder)
    return (
        "// Generated from metal/ by metal/embed.py.\n#pragma once\n"
        "namespace onebit::mps {\n"
        f'constexpr const char* kShaderSource = R"onebit({text})onebit";\n'
        "}  // namespace onebit::mps\n"
    )
