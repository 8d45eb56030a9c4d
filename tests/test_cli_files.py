"""convert, inspect and generate: what they write, and one line for what a user can mend."""

import sys
from pathlib import Path

import pytest
import torch
from test_gguf_tokenizer import ROWS, tokenizer
from test_gguf_tokenizer import model as gguf_model
from torch import nn

from torch_onebit import load_checkpoint, load_gguf, quantize_, save_checkpoint
from torch_onebit.__main__ import main
from torch_onebit.checkpoint.gguf import GGUFFile
from torch_onebit.nn import OneBitModule

transformers = pytest.importorskip("transformers")
GOLDEN = Path(__file__).parent / "data" / "mlx_checkpoint"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; returns its exit status and what it printed."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["torch_onebit", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
            if isinstance(status, str):  # what the interpreter does with it
                print(status, file=sys.stderr)
                status = 1
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def dense(tmp_path) -> Path:
    """A float Qwen3 of 64 words with a tokenizer."""
    import tokenizers

    config = transformers.Qwen3Config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=64,
    )
    folder = tmp_path / "dense"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", eos_token="w63"
    ).save_pretrained(folder)
    return folder


def assert_same(one: nn.Module, two: nn.Module) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].float(), second[name].float()) for name in first)


def test_float_to_gguf_to_mlx_to_gguf(run, dense, tmp_path):
    options = ["--symmetric", "--dtype", "float16", "--keep"]
    status, out, _ = run("convert", dense, tmp_path / "a.gguf", *options)
    assert status == 0
    assert out == (
        "no tokenizer is written: tokenizer must be byte-level BPE, got WordLevel\n"
        f"written: {tmp_path / 'a.gguf'}\n"
    )
    assert run("convert", tmp_path / "a.gguf", tmp_path / "mlx")[0] == 0
    assert run("convert", tmp_path / "mlx", tmp_path / "b.gguf")[0] == 0
    a, b = GGUFFile(tmp_path / "a.gguf"), GGUFFile(tmp_path / "b.gguf")
    assert a.metadata == b.metadata
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert torch.equal(a.bytes_of(tensor), b.bytes_of(b.tensors[name]))
    assert_same(load_gguf(tmp_path / "a.gguf"), load_checkpoint(tmp_path / "mlx"))


def test_a_byte_level_tokenizer_goes_into_gguf(run, tmp_path):
    folder = tmp_path / "mlx"
    save_checkpoint(gguf_model(), folder)
    tokenizer().save_pretrained(folder)
    assert run("convert", folder, tmp_path / "a.gguf") == (
        0,
        f"written: {tmp_path / 'a.gguf'}\n",
        "",
    )
    entries = GGUFFile(tmp_path / "a.gguf").metadata
    assert entries["tokenizer.ggml.pre"] == "gpt-2"
    assert len(entries["tokenizer.ggml.tokens"]) == ROWS


def test_float_to_mlx_is_quantize_and_keeps_the_tokenizer(run, dense, tmp_path):
    arguments = ["--method", "sign", "--group-size", "64", "--keep", "o_proj"]
    assert run("convert", dense, tmp_path / "mlx", *arguments)[0] == 0
    model = load_checkpoint(tmp_path / "mlx")
    expected = transformers.AutoModelForCausalLM.from_pretrained(dense)
    keep = lambda m, name: "o_proj" not in name
    assert_same(model, quantize_(expected, group_size=64, method="sign", filter_fn=keep))
    assert (tmp_path / "mlx" / "tokenizer.json").exists()
    status, _, err = run("convert", dense, tmp_path / "mlx")
    assert status == 1
    assert err.endswith(f"error: DST must not exist without --force, got {tmp_path / 'mlx'}\n")
    assert run("convert", dense, tmp_path / "mlx", "--force")[0] == 0
    assert not isinstance(load_checkpoint(tmp_path / "mlx").lm_head, OneBitModule)


def test_inspect_counts_layers_and_bits(run, dense, tmp_path):
    status, out, _ = run("inspect", GOLDEN, "--tensors")
    assert status == 0
    assert out.startswith("MLX, qwen3\n")
    assert "  lm_head  1 bits (affine, groups of 128)  96 x 128\n" in out
    row = next(line for line in out.splitlines() if line.startswith("1 bits"))
    assert "16 tensors" in row
    assert "1.250 bits each" in row
    run("convert", dense, tmp_path / "a.gguf", "--symmetric", "--dtype", "float16", "--keep")
    status, out, _ = run("inspect", tmp_path / "a.gguf")
    assert status == 0
    assert out.startswith("GGUF, qwen3\n")
    row = next(line for line in out.splitlines() if line.startswith("Q1_0"))
    assert "9 tensors" in row
    assert "1.125 bits each" in row


def test_generate_streams_text_and_says_how_fast(run, dense, tmp_path):
    run("convert", dense, tmp_path / "mlx")
    arguments = ["generate", tmp_path / "mlx", "w1 w2 w3", "--max-tokens", "5"]
    status, out, err = run(*arguments)
    assert status == 0
    words = out.split()
    assert len(words) == 5
    assert all(word.startswith("w") for word in words)
    assert "5 tokens, " in err
    assert "tokens per second" in err
    assert run(*arguments)[1] == out
    assert run(*arguments, "--temperature", "5", "--seed", "1")[1] != out


def broken(folder: Path) -> Path:
    save_checkpoint(quantize_(nn.Sequential(nn.Linear(128, 2))), folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 9)
    return folder


WRONG = [
    (lambda p: ["convert", p / "none", p / "x"], 1, "SRC must exist"),
    (lambda p: ["convert", GOLDEN, GOLDEN, "--force"], 1, "DST must be another path than SRC"),
    (lambda p: ["convert", GOLDEN, p / "a.gguf"], 1, "plus and minus one float16 number"),
    (lambda p: ["convert", broken(p / "m"), p / "x"], 1, "must be a safetensors file"),
    (lambda p: ["convert", GOLDEN], 2, "the following arguments are required: DST"),
    (lambda p: ["convert", GOLDEN, p / "x", "--method", "magic"], 2, "invalid choice: 'magic'"),
    (lambda p: ["inspect", p / "none"], 1, "PATH must exist"),
    (lambda p: ["inspect", p], 1, "config.json must exist"),
    (lambda p: ["inspect", __file__], 1, "must be a GGUF file"),
    (lambda p: ["generate", p / "none", "hello"], 1, "PATH must exist"),
    (lambda p: ["generate", GOLDEN, "hello"], 1, "must hold a tokenizer"),
    (lambda p: ["generate", GOLDEN, "hello", "--max-tokens", "0"], 1, "--max-tokens must be at"),
]


@pytest.mark.parametrize("arguments, status, message", WRONG, ids=[m for *_, m in WRONG])
def test_wrong_input_is_one_line_and_an_exit_status(run, arguments, status, message, tmp_path):
    got, _, err = run(*arguments(tmp_path))
    assert got == status
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["convert", "inspect", "generate"])
def test_help_says_what_the_command_is_for(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "GGUF" in out
    assert "PATH" in out or "SRC" in out
