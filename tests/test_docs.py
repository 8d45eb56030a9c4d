"""The Python snippets of README.md and docs/ run as they stand, block after block of one page."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_onebit

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def given() -> dict[str, object]:
    """What snippets take for granted: a model, its inputs, some batches of them."""
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    x = torch.randn(4, 128)
    return {
        "torch": torch,
        "torch_onebit": torch_onebit,
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
