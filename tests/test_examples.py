"""The examples run as they stand."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    "name, arguments, ends_with",
    [
        ("quickstart.py", [], "bit for bit"),
        ("load_mlx.py", [], "]]"),
        ("convert.py", ["--folder", "made"], "made/mlx, made/model.gguf"),
        ("finetune_lora.py", [], "bytes"),
        ("qat_trainer.py", ["--steps", "20"], "bit for bit"),
        ("compile_generate.py", ["--backend", "eager"], "the same tokens"),
    ],
)
def test_example_runs(name, arguments, ends_with, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    if name == "finetune_lora.py":
        pytest.importorskip("peft")
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.rstrip().endswith(ends_with)
