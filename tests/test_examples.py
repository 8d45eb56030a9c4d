"""The examples of checkpoints run as they stand."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    "name, arguments, ends_with",
    [
        ("load_mlx.py", [], "]]"),
        ("convert.py", ["--folder", "made"], "made/mlx, made/model.gguf"),
    ],
)
def test_example_runs(name, arguments, ends_with, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.rstrip().endswith(ends_with)
