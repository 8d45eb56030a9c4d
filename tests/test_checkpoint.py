"""MLX checkpoints: what mlx-lm saves is loaded, what is saved mlx-lm loads, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_models import IDS, Net, assert_same_state, make
from torch import nn

from torch_onebit import (
    OneBitEmbedding,
    OneBitLinear,
    load_checkpoint,
    quantize_,
    report,
    save_checkpoint,
    symmetrize_,
)
from torch_onebit.checkpoint import CheckpointError, files

safetensors = pytest.importorskip("safetensors.torch")
GOLDEN = Path(__file__).parent / "data" / "mlx_checkpoint"


GROUPS = {"group_size": 64, "filter_fn": lambda m, name: {"group_size": 32} if name == "up" else 1}


@pytest.mark.parametrize(
    "options, saving",
    [
        ({}, {}),
        ({"tied": True}, {}),  # the head is stored once
        ({"dtype": torch.float16}, {}),  # levels of 16 bits
        ({"dtype": torch.bfloat16}, {}),
        (GROUPS, {}),  # a layer with a group size of its own
        ({}, {"max_shard_bytes": 700}),  # several files and an index
        ({"filter_fn": lambda m, name: name != "down"}, {}),  # a dense layer among them
    ],
    ids=["plain", "tied", "float16", "bfloat16", "groups", "sharded", "mixed"],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saved_model_loads_bit_for_bit(options, saving, device, tmp_path):
    model = make(**options)
    save_checkpoint(model, tmp_path / "model", **saving)
    names = sorted(p.name for p in (tmp_path / "model").iterdir())
    assert ("model.safetensors.index.json" in names) == bool(saving)
    with torch.device(device):
        new = Net(options.get("tied", False)).to(options.get("dtype", torch.float32))
    new = load_checkpoint(tmp_path / "model", new, progress=False)
    assert_same_state(model, new)
    assert (new.head.weight is new.embed.weight) == options.get("tied", False)
    assert new.embed.padding_idx == 3
    assert torch.equal(model(IDS), new(IDS))


def test_symmetric_layers_come_back_symmetric(tmp_path):
    model = make(tied=True, symmetric=True)
    save_checkpoint(model, tmp_path)
    plain = load_checkpoint(tmp_path, Net(tied=True))
    assert not plain.up.symmetric
    found = report(symmetrize_(plain))
    assert [row.name for row in found.layers] == ["embed", "up", "down", "head"]
    assert [row.kind for row in found.left] == [""]  # vectors
    assert found.bytes_before - found.bytes_after == 4 * (
        40 * 2 + 128 * 2 + 64 * 4
    )  # a tied layer counts once
    assert_same_state(model, plain)
    assert_same_state(model, load_checkpoint(tmp_path, Net(tied=True), symmetrize=True))


def test_symmetrize_leaves_layers_that_it_would_change():
    model = make(method="optimal")
    with torch.no_grad():
        model.up.scales.fill_(float("inf"))  # decodes to NaN, as ±inf would not
        model.up.biases.fill_(-float("inf"))
        model.down.biases.copy_(-model.down.scales / 2)
    before = model(IDS)
    found = report(symmetrize_(model))
    assert [row.name for row in found.layers if "symmetrize_" in row.steps] == ["down"]
    assert [row.name for row in found.left if row.kind] == ["embed", "up", "head"]
    torch.testing.assert_close(model(IDS), before, equal_nan=True)


def test_loaded_levels_are_views_of_the_file_and_never_write_to_it(tmp_path):
    save_checkpoint(make(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load_checkpoint(tmp_path, Net())
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(tmp_path / "model.safetensors") in mapped.read_text()
    with torch.no_grad():
        model.up.scales.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    save_checkpoint(model, tmp_path)  # over the file that the model is a view of
    assert_same_state(model, load_checkpoint(tmp_path, Net()))


def test_parameters_keep_the_dtype_of_the_model_and_levels_that_of_the_file(tmp_path):
    save_checkpoint(make(dtype=torch.float16), tmp_path)
    model = load_checkpoint(tmp_path, Net())
    assert model.norm.weight.dtype == model.up.bias.dtype == torch.float32
    assert model.up.scales.dtype == torch.float16


def edit_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: [c[k].pop("mode") for k in ("quantization", "quantization_config")],
        lambda c: c.pop("quantization"),  # older files
        lambda c: c.update(text_config={"quantization": c.pop("quantization")}, q=1),
        lambda c: c["quantization"].update(bits=4, group_size=64),  # shapes win, as in mlx-lm
        lambda c: c["quantization"].update(up=True, norm=False),
    ],
    ids=["no mode", "quantization_config", "text_config", "wrong default", "booleans"],
)
def test_config_is_read_as_mlx_lm_reads_it(change, tmp_path):
    model = make()
    save_checkpoint(model, tmp_path)
    edit_config(tmp_path, change)
    assert_same_state(model, load_checkpoint(tmp_path, Net()))


# --- against mlx and mlx-lm ---


def golden_logits() -> tuple[torch.Tensor, torch.Tensor]:
    expected = np.load(GOLDEN / "expected.npz")
    return torch.from_numpy(expected["ids"]).long(), torch.from_numpy(expected["logits"])


def test_golden_checkpoint_gives_the_logits_of_mlx_lm():
    pytest.importorskip("transformers")
    model = load_checkpoint(GOLDEN, dtype=torch.float32)
    assert isinstance(model.lm_head, OneBitLinear)
    assert isinstance(model.model.embed_tokens, OneBitEmbedding)
    ids, logits = golden_logits()
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_mlx_lm_computes_the_same_from_what_is_saved(tied, tmp_path):
    pytest.importorskip("mlx_lm")
    transformers = pytest.importorskip("transformers")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    config = transformers.Qwen2Config(  # has biases of its own beside the levels
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=80,
        tie_word_embeddings=tied,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(p)
    quantize_(model, group_size=64, filter_fn=lambda m, n: {"group_size": 32 if "q_" in n else 64})
    save_checkpoint(model, tmp_path)
    theirs, _ = load_model(tmp_path)
    ids = IDS[:1]
    logits = torch.from_numpy(np.array(theirs(mx.array(ids.numpy()))))
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)
    again = load_checkpoint(tmp_path)
    assert_same_state(model, again)
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_layers_of_other_bits_are_an_error_or_dense(bits, tmp_path):
    mx = pytest.importorskip("mlx.core")
    w = torch.randn(64, 128)
    words, scales, biases = (
        torch.from_numpy(np.array(t)) for t in mx.quantize(mx.array(w.numpy()), 64, bits)
    )
    dense = mx.dequantize(
        *(mx.array(t.numpy()) for t in (words, scales, biases)), group_size=64, bits=bits
    )
    save_checkpoint(make(filter_fn=lambda m, name: name != "down"), tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    tensors |= {"down.weight": words, "down.scales": scales, "down.biases": biases}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, lambda c: c["quantization"].update(down={"group_size": 64, "bits": bits}))
    with pytest.raises(CheckpointError, match=rf"1 bit, got down: {bits} bits \(affine, groups of"):
        load_checkpoint(tmp_path, Net())
    model = load_checkpoint(tmp_path, Net(), other_bits="dequantize")
    assert type(model.down) is nn.Linear
    assert torch.equal(model.down.weight, torch.from_numpy(np.array(dense)))
    with pytest.raises(CheckpointError, match=f"down must be of 1 bit in this model, got {bits}"):
        load_checkpoint(tmp_path, make(), other_bits="dequantize")


# --- saving is all or nothing ---


def stop(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "os.fsync", "json.dumps"])
def test_interrupted_save_leaves_the_old_checkpoint(where, tmp_path, monkeypatch):
    old, folder = make(), tmp_path / "model"
    save_checkpoint(old, folder)
    with monkeypatch.context() as patch:
        patch.setattr(where, stop)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(make(), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert_same_state(old, load_checkpoint(folder, Net()))


@pytest.mark.parametrize("at_once", [True, False], ids=["exchange", "renames"])
def test_save_replaces_the_checkpoint_and_keeps_other_files(at_once, tmp_path, monkeypatch):
    if not at_once:
        monkeypatch.setattr(files, "_exchange_at_once", lambda first, second: False)
    folder = tmp_path / "model"
    save_checkpoint(make(), folder, max_shard_bytes=700)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("kept")
    new = make()
    save_checkpoint(new, folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "sub",
        "tokenizer.json",
    ]
    assert (folder / "sub" / "config.json").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert_same_state(new, load_checkpoint(folder, Net()))
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_save_follows_a_link_to_the_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_checkpoint(make(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()


# --- models and checkpoints that do not fit ---


def swap_bits(tensors: dict) -> None:
    tensors["head.weight"] = tensors["embed.weight"].view(torch.int32).bitwise_not()
    tensors["head.weight"] = tensors["head.weight"].view(torch.uint32)
    tensors["head.scales"] = tensors["embed.scales"].clone()
    tensors["head.biases"] = tensors["embed.biases"].clone()


MISFITS = {
    "lacks": (lambda t: t.pop("norm.bias"), r"but it lacks norm\.bias$"),
    "has more": (lambda t: t.update(x=torch.ones(2)), r"but it has x that the model lacks"),
    "shape": (
        lambda t: t.update({"norm.bias": torch.ones(3)}),
        r"norm\.bias must have shape \[64\]",
    ),
    "rows": (
        lambda t: [t.update({f"up.{k}": t[f"up.{k}"][:5].clone()}) for k in files_of_layer],
        r"up must have shape \[128, 64\] as in the model, got \[5, 64\]",
    ),
    "no words": (lambda t: t.pop("up.weight"), r"up\.scales must have a up\.weight"),
    "no biases": (lambda t: t.pop("up.biases"), r"up\.scales must have up\.biases beside it"),
    "float words": (
        lambda t: t.update({"up.weight": t["up.weight"].view(torch.float32)}),
        r"up\.weight must be U32, got F32",
    ),
    "levels": (
        lambda t: t.update({"up.biases": t["up.biases"].half()}),
        r"up\.biases must be F32, got F16",
    ),
    "odd norm": (
        lambda t: t.update({f"norm.{k}": t[f"up.{k}"].clone() for k in files_of_layer}),
        r"norm must be an nn\.Linear or nn\.Embedding \(no subclass\).*got LayerNorm",
    ),
}
files_of_layer = ("weight", "scales", "biases")


@pytest.mark.parametrize("name", MISFITS)
def test_misfit_is_named_before_the_model_is_touched(name, tmp_path):
    change, message = MISFITS[name]
    save_checkpoint(make(tied=True), tmp_path)
    tensors = {
        k: t.clone() for k, t in safetensors.load_file(tmp_path / "model.safetensors").items()
    }
    change(tensors)
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    model = Net(tied=True)
    before = list(model.modules())
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path, model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_tied_head_that_the_file_holds_twice_must_be_the_same(tmp_path):
    save_checkpoint(make(tied=True), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {k: t.clone() for k, t in safetensors.load_file(path).items()}
    tensors |= {f"head.{k}": tensors[f"embed.{k}"].clone() for k in files_of_layer}
    safetensors.save_file(tensors, path)
    model = load_checkpoint(tmp_path, Net(tied=True))
    assert model.head.weight is model.embed.weight
    swap_bits(tensors)
    safetensors.save_file(tensors, path)
    with pytest.raises(CheckpointError, match="head must equal embed, to which the model ties it"):
        load_checkpoint(tmp_path, Net(tied=True))
    load_checkpoint(tmp_path, Net(tied=False))


def test_strict_false_leaves_what_does_not_match(tmp_path):
    model = make()
    save_checkpoint(model, tmp_path)
    other = Net()
    other.extra = nn.Linear(4, 4)
    del other.down
    load_checkpoint(tmp_path, other, strict=False)
    assert torch.equal(other.up.weight, model.up.weight)
    assert type(other.extra) is nn.Linear


BAD_CALLS = [
    (lambda p: load_checkpoint(p, Net(), other_bits="no"), ValueError, "other_bits must be one of"),
    (lambda p: load_checkpoint(p, "model"), TypeError, "model must be an nn.Module"),
    (lambda p: load_checkpoint(p, Net(), dtype=torch.half), ValueError, "dtype must be None"),
    (lambda p: load_checkpoint(p / "none", Net()), CheckpointError, "path must be a folder"),
    (
        lambda p: save_checkpoint(Net(), p),
        CheckpointError,
        "model must have 1-bit layers, got none",
    ),
    (lambda p: save_checkpoint(make().to("meta"), p), CheckpointError, "got them on meta"),
    (lambda p: save_checkpoint(make(group_size=128), p), CheckpointError, "must have whole groups"),
    (
        lambda p: save_checkpoint(make(), p, max_shard_bytes=0),
        ValueError,
        "max_shard_bytes must be",
    ),
    (lambda p: save_checkpoint(make(), p / "config.json"), CheckpointError, "must be a folder"),
]


@pytest.mark.parametrize("call, kind, message", BAD_CALLS, ids=[m for *_, m in BAD_CALLS])
def test_wrong_arguments_are_named(call, kind, message, tmp_path):
    save_checkpoint(make(), tmp_path)
    with pytest.raises(kind, match=message):
        call(tmp_path)
