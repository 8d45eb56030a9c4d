"""GGUF: Q1_0 exactly both ways, against the gguf package and transformers' own reader."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torch_onebit import OneBitLinear, export_gguf, load_gguf, quantize_
from torch_onebit.checkpoint import CheckpointError, GGUFCheckpoint, Packed, blocks, save_gguf
from torch_onebit.checkpoint.architectures import gguf_name, interleave, model_name, separate
from torch_onebit.checkpoint.gguf import GGUFFile

transformers = pytest.importorskip("transformers")
IDS = torch.arange(10).view(2, 5)


def build(kind: str, tied: bool = False, quantized: bool = True, vocab_size: int = 80) -> nn.Module:
    config = transformers.AutoConfig.for_model(
        kind,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64 if kind == "qwen3" else 32,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p)
    if quantized:
        quantize_(model, symmetric=True, method="sign", filter_fn=lambda m, n: "k_proj" not in n)
    return model


@pytest.mark.parametrize("kind, tied", [("llama", False), ("qwen2", True), ("qwen3", False)])
def test_exported_model_loads_exactly_and_exports_the_same_file(kind, tied, tmp_path):
    model = build(kind, tied)
    export_gguf(model, tmp_path / "a.gguf")
    loaded = load_gguf(tmp_path / "a.gguf", dtype=torch.float16, symmetrize=True)
    first, second = model.state_dict(), loaded.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(model.float()(IDS).logits, loaded.float()(IDS).logits)
    export_gguf(load_gguf(tmp_path / "a.gguf", dtype=torch.float16), tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_transformers_reads_the_dense_tensors_as_they_were(kind, tmp_path):
    pytest.importorskip("gguf")
    model = build(kind, quantized=False)
    config = {**model.config.to_dict(), "model_type": kind}
    save_gguf(tmp_path / "dense.gguf", config, [], model.state_dict().items(), {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="dense.gguf", dtype=torch.float16
    ).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_gguf_package_reads_the_same_tensors(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = build("qwen3")
    export_gguf(model, tmp_path / "a.gguf", metadata={"tokenizer.ggml.tokens": ["a", "β"]})
    ours, theirs = GGUFFile(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")
    assert theirs.fields["tokenizer.ggml.tokens"].contents() == ["a", "β"]
    assert theirs.fields["qwen3.rope.freq_base"].contents() == pytest.approx(10000.0)
    assert {t.name for t in theirs.tensors} == ours.tensors.keys()
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert (t.tensor_type, t.data_offset) == (mine.kind, mine.offset)
        assert t.data.tobytes() == ours.bytes_of(mine).numpy().tobytes()


def test_blocks_written_by_the_gguf_package_are_read(tmp_path):
    """d = 0.5 in each block; words count up; Q8_0 as its own package decodes it."""
    gguf = pytest.importorskip("gguf")
    data = np.zeros((3, 2, 18), np.uint8)
    data[..., :2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    data[..., 2:] = np.arange(96).reshape(3, 2, 16)
    q8 = gguf.quantize(np.random.randn(4, 64).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    q1, q8_0 = gguf.GGMLQuantizationType.Q1_0, gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("one", data.reshape(3, 36), raw_dtype=q1)
    writer.add_tensor("eight", q8, raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "a.gguf")
    one, eight = file.tensors["one"], file.tensors["eight"]
    assert one.shape == (3, 256)
    packed = blocks.unpack_q1_0("one", file.bytes_of(one), 3, 256)
    assert (packed.scales == 1).all()
    assert (packed.biases == -0.5).all()
    assert packed.weight.view(torch.uint8).tolist() == np.arange(96).reshape(3, 32).tolist()
    assert torch.equal(blocks.pack_q1_0("one", packed), file.bytes_of(one))
    decoded = blocks.decode(eight.kind, file.bytes_of(eight), eight.shape).numpy()
    np.testing.assert_array_equal(decoded, gguf.dequantize(q8, q8_0))


@pytest.mark.parametrize("kind", ["LLAMA", "QWEN2", "QWEN3"])
def test_names_are_those_of_the_gguf_package(kind):
    gguf = pytest.importorskip("gguf")
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind), 3)
    model = build(kind.lower(), quantized=False)
    for name in model.state_dict():
        theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name(name) == theirs
        assert model_name(theirs) == name


def test_rows_are_interleaved_as_llama_cpp_does():
    """convert_hf_to_gguf.py: reshape(heads, 2, rows // heads // 2, k).swapaxes(1, 2)."""
    w = torch.randn(24, 5)
    theirs = w.numpy().reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(24, 5)
    np.testing.assert_array_equal(interleave(w, 3).numpy(), theirs)
    assert torch.equal(separate(interleave(w, 3), 3), w)


def levels(scales, biases, group_size=128, dtype=torch.float16):
    columns = group_size * 2
    words = torch.zeros(1, columns // 32, dtype=torch.int32)
    full = [torch.full((1, 2), v, dtype=dtype) for v in (scales, biases)]
    return Packed(words, *full, group_size)


def test_a_single_block_is_read():
    """Contiguous as it lies, its words two bytes off."""
    packed = levels(1.0, -0.5)
    one = Packed(packed.weight[:, :4] + 7, packed.scales[:, :1], packed.biases[:, :1], 128)
    again = blocks.unpack_q1_0("up", blocks.pack_q1_0("up", one), 1, 128)
    assert torch.equal(again.weight, one.weight)
    data = torch.arange(34, dtype=torch.uint8)
    data[:2] = torch.ones(1, dtype=torch.float16).view(torch.uint8)
    assert blocks.decode(8, data, (1, 32)).tolist() == [list(range(2, 34))]


NOT_Q1_0 = [
    (levels(1.0, -0.5, group_size=64), "must have groups of 128 for GGUF Q1_0, got 64"),
    (levels(1.0, -0.25), r"must have weights of plus and minus one float16 number .* got 2 groups"),
    (levels(1.0, float("nan")), "plus and minus one float16 number"),
    (levels(0.1, -0.05, dtype=torch.float32), "plus and minus one float16 number"),
    (levels(6e-8, -3e-8), "plus and minus one float16 number"),  # half of the smallest float16
]


@pytest.mark.parametrize("layer, message", NOT_Q1_0)
def test_export_refuses_what_would_lose_bits(layer, message):
    with pytest.raises(CheckpointError, match=message):
        blocks.pack_q1_0("up", layer)


@pytest.mark.parametrize("d", [65504.0, float("inf"), float("nan")])
def test_scales_that_float16_cannot_double_are_refused(d):
    data = torch.zeros(1, 18, dtype=torch.uint8)
    data[0, :2] = torch.tensor([d], dtype=torch.float16).view(torch.uint8)
    with pytest.raises(CheckpointError, match="up must have scales of at most 32752"):
        blocks.unpack_q1_0("up", data.flatten(), 1, 128)


def stop(*args):
    raise KeyboardInterrupt


def test_interrupted_export_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = build("qwen3"), tmp_path / "a.gguf"
    export_gguf(model, path)
    before = path.read_bytes()
    monkeypatch.setattr(blocks, "pack_q1_0", stop)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


GEMMA = transformers.AutoConfig.for_model("gemma")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: setattr(m, "config", GEMMA), "architecture must be one of"),
        (lambda m: m.add_module("extra", nn.Linear(2, 2)), "extra.weight must have a name in GGUF"),
        (lambda m: m.model.double(), "must be float32, float16 or bfloat16|plus and minus"),
    ],
)
def test_models_that_gguf_has_no_words_for(change, message, tmp_path):
    model = build("qwen3")
    change(model)
    with pytest.raises(CheckpointError, match=message):
        export_gguf(model, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


# --- files that mean harm ---


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(name="token_embd.weight", kind=0, shape=(4, 2), offset=0) -> bytes:
    return (
        text(name)
        + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        + struct.pack("<IQ", kind, offset)
    )


def header(*parts: bytes, tensors=1, entries=1, version=3, magic=b"GGUF") -> bytes:
    architecture = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    head = magic + struct.pack("<IQQ", version, tensors, entries) + architecture + b"".join(parts)
    return head + bytes(-len(head) % 32) + bytes(32)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


HUGE = 2**60
HOSTILE = {
    "magic": (header(entry(), magic=b"GGML"), "must be a GGUF file"),
    "version": (header(entry(), version=9), "version must be one of"),
    "big endian": (header(entry(), version=3 << 24), "little-endian"),
    "2^60 tensors": (header(entry(), tensors=HUGE), "more than can be meant"),
    "2^60 entries": (header(entry(), entries=HUGE), "more than can be meant"),
    "many tensors": (header(entry(), tensors=1000), "must be there|must have|names|UTF-8"),
    "long string": (header(struct.pack("<Q", HUGE)), f"must have {HUGE} bytes"),
    "array": (
        header(pair("x", 9, struct.pack("<IQ", 0, HUGE)), entry(), entries=2),
        f"must have {HUGE} bytes",
    ),
    "strings": (
        header(pair("x", 9, struct.pack("<IQ", 8, HUGE)), entry(), entries=2),
        "must have room for",
    ),
    "nested": (
        header(pair("x", 9, struct.pack("<IQ", 9, 1)), entry(), entries=2),
        "arrays must hold scalars or strings, got type 9",
    ),
    "type of value": (header(pair("x", 99, b""), entry(), entries=2), "of a type from 0 to 12"),
    "key twice": (
        header(pair("general.architecture", 7, b"\1"), entry(), entries=2),
        "must be there once",
    ),
    "bytes": (header(struct.pack("<Q", 1) + b"\xff" + bytes(99)), "strings must be UTF-8"),
    "dimensions": (header(entry(shape=(1,) * 9)), "at most 4 dimensions, got 9"),
    "overflow": (header(entry(shape=(2**63, 2**63))), "must lie in the file"),
    "outside": (header(entry(offset=64)), "must lie in the file"),
    "unaligned": (header(entry(offset=4)), "must lie in the file, at a multiple of 32"),
    "offset": (header(entry(offset=2**64 - 32)), "must lie in the file"),
    "half a block": (header(entry(kind=41, shape=(64, 1))), "whole blocks of 128"),
    "overlap": (
        header(entry(shape=(8,)), entry(name="output_norm.weight", shape=(8,)), tensors=2),
        "must not overlap",
    ),
    "name twice": (header(entry(shape=(0,)), entry(shape=(0,)), tensors=2), "must differ"),
    "alignment": (
        header(pair("general.alignment", 4, struct.pack("<I", 3)), entry(), entries=2),
        "general.alignment must be a power of 2",
    ),
    "TQ1_0": (header(entry(kind=34)), r"got token_embd\.weight \(TQ1_0\): ternary"),
    "TQ2_0": (header(entry(kind=35)), r"got token_embd\.weight \(TQ2_0\): ternary"),
    "Q2_0": (header(entry(kind=42)), r"got token_embd\.weight \(Q2_0\): ternary"),
    "PTQ1_0": (header(entry(kind=43)), r"got token_embd\.weight \(number 43, which is unknown\)"),
    "Q4_K": (header(entry(kind=12)), r"got token_embd\.weight \(Q4_K\)$"),
    "name": (header(entry(name="blk.0.secret.weight")), "must be a tensor of the model"),
    "sizes": (header(entry()), "llama.embedding_length must be a positive number, got None"),
    "truncated": (header(entry())[:60], "must have .* bytes at"),
    "empty": (b"", "must be a GGUF file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused(name, tmp_path):
    data, message = HOSTILE[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint(path)


def test_config_must_agree_with_the_tensors(tmp_path):
    """What the file says of the model is what will be built: 2^31 blocks would never end."""
    export_gguf(build("qwen3"), tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    for key, value, message in [
        ("block_count", 4000, "ffn_down of block 2 must be as described"),
        ("block_count", 2**31, "block_count must be a positive number"),
        ("embedding_length", 1 << 20, "embedding_length must be as described"),
        ("feed_forward_length", 1 << 20, "ffn_down of block 0 must be as described"),
    ]:
        at = data.index(f"qwen3.{key}".encode()) + len(f"qwen3.{key}") + 4
        changed = data[:at] + struct.pack("<I", value) + data[at + 4 :]
        (tmp_path / "b.gguf").write_bytes(changed)
        with pytest.raises(CheckpointError, match=message):
            GGUFCheckpoint(tmp_path / "b.gguf")


def test_loaded_layers_are_packed(tmp_path):
    export_gguf(build("qwen3"), tmp_path / "a.gguf")
    model = load_gguf(Path(tmp_path / "a.gguf"))
    assert isinstance(model.lm_head, OneBitLinear)
    assert model.lm_head.scales.dtype == torch.float16
