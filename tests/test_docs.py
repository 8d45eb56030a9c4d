"""The Python snippets of README.md and docs/ run as they stand, block after block of one page."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_onebit

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import make_api  # noqa: E402

PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def given() -> dict[str, object]:
    """What snippets take for granted: a model, its inputs, some batches of them."""

    def make_model() -> nn.Module:
        return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))

    model = make_model()
    x = torch.randn(4, 128)
    return {
        "copy": copy,
        "torch": torch,
        "torch_onebit": torch_onebit,
        "make_model": make_model,
        "model": model,
        "float_model": copy.deepcopy(model),
        "x": x,
        "batches": [x, x.flip(0)],
    }


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    names = given()
    if any("transformers" in code for code in snippets(page)):
        pytest.importorskip("transformers")
    for code in snippets(page):
        exec(compile(code, page, "exec"), names)


def test_files_that_pages_name_exist():
    missing = [
        f"{page}: {name}"
        for page in [*PAGES, "CONTRIBUTING.md"]
        for name in re.findall(
            r"\b((?:docs|examples|tests|benchmarks|csrc|metal|torch_onebit)/[\w./-]+\.\w+)\b",
            (ROOT / page).read_text(),
        )
        if not (ROOT / name).exists()
    ]
    assert not missing


def test_the_api_page_is_what_the_docstrings_say():
    assert make_api.PAGE.read_text() == make_api.page(), "run `make docs`"
    assert all(f"### {name}\n" in make_api.page() for name in torch_onebit.__all__)


def source_texts() -> str:
    """All sources, with the pieces of a string that is written over several lines joined."""
    files = [
        ROOT / "setup.py",
        *(ROOT / "torch_onebit").rglob("*.py"),
        *(p for p in (ROOT / "csrc").rglob("*.*") if p.suffix != ".pyc"),
    ]
    text = "\n".join(path.read_text() for path in files)
    return re.sub(r'"\s*f?"', "", re.sub(r'\\n"\s*f?"', " ", text))


def test_messages_that_troubleshooting_quotes_are_in_the_sources():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)`", page, re.M)
    assert len(quoted) > 15
    sources = source_texts()
    pieces = {quote: re.split(r"\s*…\s*", quote) for quote in quoted}
    missing = [q for q, parts in pieces.items() if not all(part in sources for part in parts)]
    assert not missing


def test_pages_link_to_each_other():
    """Every page of docs/ can be reached from the README."""
    linked, todo = set(), ["README.md"]
    while todo:
        page = todo.pop()
        if page in linked:
            continue
        linked.add(page)
        for target in re.findall(r"\]\(([\w./-]+\.md)\)", (ROOT / page).read_text()):
            path = (ROOT / page).parent / target
            assert path.exists(), f"{page}: {target}"
            todo.append(str(path.resolve().relative_to(ROOT)))
    assert set(PAGES) <= linked


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict"]
    built = subprocess.run(
        [*command, "--site-dir", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    pages = {path.parent.name for path in tmp_path.glob("*/index.html")}
    assert {Path(page).stem for page in PAGES} - {"README", "index"} <= pages
    loaded = re.findall(
        r'(?:src|<link[^>]* href)="(https?:[^"]*)"', (tmp_path / "index.html").read_text()
    )
    assert not loaded
