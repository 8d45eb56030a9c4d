"""Folders of checkpoints that mean harm, or are put together in an unusual way."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_models import Net, assert_same_state, make

import torch_onebit
from torch_onebit import (
    load_checkpoint,
    save_checkpoint,
)
from torch_onebit.checkpoint import CheckpointError, MLXCheckpoint, files, save_mlx

safetensors = pytest.importorskip("safetensors.torch")


def test_quantized_path_without_the_model_needs_no_module(tmp_path):
    save_checkpoint(make(), tmp_path)
    source = MLXCheckpoint(tmp_path)
    assert sorted(source.paths) == ["down", "embed", "head", "up"]
    assert sorted(source.names) == ["norm.bias", "norm.weight", "steps", "up.bias"]
    assert str(source.layer("up")) == "1 bits (affine, groups of 32)"


def rewrite_index(change):
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return apply


def link(target: str):
    def apply(folder: Path) -> None:
        (folder / "a.safetensors").symlink_to(target)
        rewrite_index(lambda m: m.update({k: "a.safetensors" for k in m}))(folder)

    return apply


def truncate(folder: Path) -> None:
    path = min(folder.glob("model-*"))
    path.write_bytes(path.read_bytes()[:-1])


def pipe(folder: Path) -> None:
    path = min(folder.glob("model-*"))
    path.unlink()
    os.mkfifo(path)


def config(text: str):
    return lambda folder: (folder / "config.json").write_text(text)


def twice(folder: Path) -> None:
    path = min(folder.glob("model-*"))
    (folder / "model-9.safetensors").write_bytes(path.read_bytes())
    (folder / "model.safetensors.index.json").unlink()


HOSTILE = {
    "index out": (rewrite_index(lambda m: m.update({"x": "../x.safetensors"})), "without folders"),
    "index absolute": (rewrite_index(lambda m: m.update({"x": "/etc/passwd"})), "without folders"),
    "index zero byte": (rewrite_index(lambda m: m.update({"x": "a\0b"})), "without folders"),
    "index dots": (rewrite_index(lambda m: m.update({"x": ".."})), "without folders|regular file"),
    "index number": (rewrite_index(lambda m: m.update({"x": 5})), "must map names to files"),
    "index absent": (rewrite_index(lambda m: m.update({"x": "gone.safetensors"})), "must exist"),
    "index lies": (
        rewrite_index(lambda m: m.update({"up.bias": max(m.values())})),
        "must agree with the files about up.bias",
    ),
    "link out": (link("/etc/passwd"), "must stay in its folder"),
    "link to device": (link("/dev/zero"), "must be a regular file"),
    "pipe": (pipe, "must be a regular file"),
    "truncated": (truncate, "must be a safetensors file"),
    "twice": (twice, "must be in one file"),
    "config list": (config("[]"), "must be a JSON object, got list"),
    "config bomb": (config("[" * 100_000), "must be JSON"),
    "config bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "must be JSON"),
    "config large": (config("[" + "1," * (files.MAX_JSON_BYTES // 2) + "1]"), "must be at most"),
    "not quantized": (config("{}"), 'must have a "quantization" block'),
    "zero bits": (config('{"quantization": {"bits": 0, "group_size": 32}}'), "bits of .* must be"),
    "huge group": (
        config('{"quantization": {"bits": 1, "group_size": 1152921504606846976}}'),
        "group_size of .* must be",
    ),
    "bits true": (config('{"quantization": {"bits": true, "group_size": 32}}'), "bits of .* must"),
    "mode list": (
        config('{"quantization": {"bits": 1, "group_size": 32, "mode": [1]}}'),
        "mode of .* must be a string",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folder_is_refused(name, tmp_path):
    change, message = HOSTILE[name]
    save_checkpoint(make(), tmp_path, max_shard_bytes=700)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        source = MLXCheckpoint(tmp_path)
        for path in source.paths:  # without the columns of a model, the config decides
            source.layer(path)


CONFIGS = [  # a change of config.json that transformers cannot make a model of
    {"model_type": "nonsense"},
    {"model_type": 7},
    {"vocab_size": 2**40},  # more than memory
    {"vocab_size": 2**63},
    {"hidden_size": "abc"},
    {"num_attention_heads": 0},
    {"num_attention_heads": -1},
    {"hidden_act": "nonsense"},
    {"id2label": 5},
    {"dtype": "nonsense"},
]


@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_a_config_that_no_model_can_be_made_of_is_refused(change, tmp_path):
    pytest.importorskip("transformers")
    golden = Path(__file__).parent / "data" / "mlx_checkpoint"
    config = json.loads((golden / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(golden / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"config must (describe|have)"):
        load_checkpoint(tmp_path)


def test_link_into_the_blobs_of_the_hub_cache_is_followed(tmp_path):
    folder = tmp_path / "snapshots" / "0123"
    model = make()
    save_checkpoint(model, folder)
    (tmp_path / "blobs").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "blobs" / "abcd")
    (folder / "model.safetensors").symlink_to("../../blobs/abcd")
    assert_same_state(model, load_checkpoint(folder, Net()))


def test_unaligned_words_are_read(tmp_path):
    """A header of any length is legal, and so is an odd count of 16-bit values before the words."""
    save_checkpoint(make(), tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    path.write_bytes(
        (size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :]
    )
    source = MLXCheckpoint(tmp_path)
    for p in source.paths:
        packed = source.packed(p)
        assert packed.weight.data_ptr() % 4 == packed.scales.data_ptr() % 4 == 0


def test_save_refuses_a_name_given_twice(tmp_path):
    layer = torch_onebit.checkpoint.Packed(*torch_onebit.quantize(torch.randn(2, 32), 32), 32)
    with pytest.raises(CheckpointError, match=r"up\.scales must be given once, got it twice"):
        save_mlx(tmp_path, {}, [("up", layer)], [("up.scales", torch.ones(2))])
