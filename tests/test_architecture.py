"""Who may include whom: the rules of docs/architecture.md, read off the sources."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# files, what they must not include or import, why
RULES = [
    (
        "metal/*.metal",
        r'^"(?!\w+\.h"$|\.\./csrc/format\.h"$)',
        "shaders see shaders and the format",
    ),
    ("metal/*", r"torch|ATen|c10", "shaders know no torch"),
    ("csrc/format.h", r".", "the format includes nothing: shaders read it too"),
    ("csrc/mps/launch_plan.h", r"torch|ATen|c10|Metal/|Foundation|<string>", "plans are plain C++"),
    ("csrc/cpu/kernels*", r"torch|ATen|c10", "kernels compile without torch"),
    ("csrc/cpu/*-inl.h", r"torch|ATen|c10", "kernels compile without torch"),
    ("csrc/cpu/*", r"mps/", "a backend knows no other"),
    ("csrc/mps/*", r"cpu/", "a backend knows no other"),
    ("csrc/**/*", r"torch/extension\.h|ATen/ATen\.h|torch/all\.h", "narrow headers only"),
    ("torch_onebit/nn/*.py", r"torch\.ops\.onebit|<<|>>", "modules call torch_onebit.ops"),
    ("torch_onebit/checkpoint/*.py", r"torch_onebit\.nn", "formats do not know modules"),
    ("torch_onebit/checkpoint/*.py", r"pickle|torch\.load\b|eval\(", "files run no code"),
    ("tests/reference.py", r"torch", "the reference is independent"),
]


def relevant(path: Path) -> list[str]:
    """The lines of a file that name another one; for Python modules, all code lines count."""
    text = path.read_text()
    if path.suffix == ".py":
        code = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
        return [line for line in code.splitlines() if not line.lstrip().startswith("#")]
    return re.findall(r"^\s*#\s*(?:include|import)\s+(\S+)", text, flags=re.MULTILINE)


@pytest.mark.parametrize("files, never, why", RULES, ids=[f"{r[0]} {r[2]}" for r in RULES])
def test_include_rules(files, never, why):
    broken = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted(ROOT.glob(files))
        if path.is_file()
        for line in relevant(path)
        if re.search(never, line)
    ]
    assert not broken, why


def test_every_rule_still_finds_its_files():
    """A rule whose files moved would pass for nothing; folders not built yet are listed here."""
    later = ("metal/", "csrc/mps/", "csrc/cpu/*-inl.h")
    missing = [
        files for files, *_ in RULES if not files.startswith(later) and not any(ROOT.glob(files))
    ]
    assert not missing
