"""1-bit models of transformers: loaded, quantized on load, saved, trained; many architectures."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torch_onebit import (
    OneBitEmbedding,
    OneBitLinear,
    PrepackedLinear,
    dequantize_,
    load_checkpoint,
    prepack_,
    quantize_,
    save_checkpoint,
    thaw_levels_,
)
from torch_onebit.checkpoint import CheckpointError
from torch_onebit.nn import OneBitModule

transformers = pytest.importorskip("transformers")

from torch_onebit.transformers import OneBitConfig, attach_quantizer_  # noqa: E402

AutoModelForCausalLM = transformers.AutoModelForCausalLM
GOLDEN = Path(__file__).parent / "data" / "mlx_checkpoint"
IDS = torch.arange(6)[None]
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}


def build(kind: str = "qwen2", tied: bool = False, **sizes) -> nn.Module:
    config = transformers.AutoConfig.for_model(
        kind,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=80,
        tie_word_embeddings=tied,
        **sizes,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def load(folder, **options):
    """The model, loaded without a key missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def assert_same(one: nn.Module, two: nn.Module) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def test_an_mlx_folder_loads_as_it_is():
    model = load(GOLDEN, dtype=torch.float32)
    layers = [m for m in model.modules() if isinstance(m, OneBitModule)]
    assert len(layers) == 2 * 7 + 2
    assert isinstance(model.lm_head, OneBitLinear)
    assert isinstance(model.model.embed_tokens, OneBitEmbedding)
    assert {m.weight.dtype for m in layers} == {torch.int32}
    assert {m.scales.dtype for m in layers} == {torch.float16}  # the file's
    assert not any(p.requires_grad for m in layers for p in m.parameters())
    expected = np.load(GOLDEN / "expected.npz")
    logits = model(torch.from_numpy(expected["ids"]).long()).logits
    torch.testing.assert_close(logits, torch.from_numpy(expected["logits"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_on_load_saved_and_loaded_bit_for_bit(tied, symmetric, tmp_path):
    dense = build(tied=tied)
    dense.save_pretrained(tmp_path / "dense")
    options = {"group_size": 32, "symmetric": symmetric}
    config = OneBitConfig(modules_to_not_convert=[], **options)
    model = load(tmp_path / "dense", quantization_config=config)
    assert_same(model, quantize_(copy.deepcopy(dense), skip=[], **options))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "onebit")
    again = load(tmp_path / "onebit")
    assert_same(model, again)
    assert again.model.layers[0].mlp.up_proj.symmetric == symmetric
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    plain = load_checkpoint(tmp_path / "onebit", copy.deepcopy(dense), symmetrize=symmetric)
    assert_same(plain, model)


@pytest.mark.parametrize("tied", [False, True])
def test_mlx_lm_reads_what_save_pretrained_writes(tied, tmp_path):
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model = attach_quantizer_(quantize_(build(tied=tied), group_size=32, symmetric=tied))
    model.save_pretrained(tmp_path)
    theirs, _ = load_model(tmp_path)
    logits = torch.from_numpy(np.array(theirs(mx.array(IDS.numpy()))))
    torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=1e-5)
    assert_same(model, load(tmp_path))


def test_a_folder_of_save_checkpoint_loads_with_group_sizes_of_its_own(tmp_path):
    sizes = lambda m, name: {"group_size": 32 if "down" in name else 64}
    model = quantize_(build(), filter_fn=sizes)
    save_checkpoint(model, tmp_path)
    assert_same(model, load(tmp_path))


MIXED = [
    # model_type, tied, layers of 8 bits, why
    ("qwen2", True, ["embed_tokens"], "a tied embedding"),
    ("qwen2", False, ["o_proj", "lm_head"], "layers and the head"),
    ("qwen3_moe", False, ["mlp.gate"], "what mlx-lm makes of a router, which is no nn.Linear"),
    ("qwen3_moe", False, ["0.mlp.switch_mlp.up_proj"], "one of the matrices of experts"),
]


@pytest.mark.parametrize("kind, tied, names, why", MIXED, ids=[m[3] for m in MIXED])
def test_layers_of_other_bits_in_an_mlx_folder(kind, tied, names, why, tmp_path):
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    import mlx.nn
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    sizes = {**MOE, "num_experts": 4, "decoder_sparse_step": 1} if kind == "qwen3_moe" else {}
    model = attach_quantizer_(quantize_(build(kind, tied, head_dim=32, **sizes), group_size=64))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    block = config["quantization"]
    dense = tmp_path / "dense"
    model.dequantize().save_pretrained(dense)
    del config["quantization"], config["quantization_config"]
    (dense / "config.json").write_text(json.dumps(config))
    theirs, _ = load_model(dense)

    def form(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        if any(path.endswith(name) for name in names):
            block[path] = {"group_size": 32, "bits": 8}
            return block[path]
        return not path.endswith("mlp.gate") and {"group_size": 64, "bits": 1}

    mlx.nn.quantize(theirs, class_predicate=form)
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"), dict(tree_flatten(theirs.parameters()))
    )
    config |= {"quantization": block, "quantization_config": block}
    (tmp_path / "config.json").write_text(json.dumps(config))
    logits = torch.from_numpy(np.array(theirs(mx.array(IDS.numpy()))))
    with pytest.raises(CheckpointError, match=r"got .*: 8 bits .*other_bits='dequantize'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    option = OneBitConfig(other_bits="dequantize")
    model = load(tmp_path, quantization_config=option)
    torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=1e-4)
    assert_same(model, load_checkpoint(tmp_path, other_bits="dequantize"))
    model.save_pretrained(tmp_path / "again")
    assert_same(model, load(tmp_path / "again"))


def test_modules_to_not_convert_and_the_default(tmp_path):
    build(tied=True).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=OneBitConfig(group_size=64))
    assert type(model.model.embed_tokens) is nn.Embedding  # tied to the head
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[1].mlp.up_proj, OneBitLinear)
    config = OneBitConfig(group_size=64, modules_to_not_convert=["model.layers.0", "up_proj"])
    model = load(tmp_path, quantization_config=config)
    names = [name for name, m in model.named_modules() if isinstance(m, OneBitModule)]
    assert "model.embed_tokens" in names
    assert "model.layers.1.mlp.down_proj" in names
    assert not any("layers.0." in name or "up_proj" in name for name in names)


def test_generate_with_dynamic_and_static_cache_and_in_one_graph(tmp_path):
    model = attach_quantizer_(quantize_(build(), group_size=32))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(IDS, **options)
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(plain, static)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)


def test_trainer_trains_levels_and_its_checkpoint_loads(tmp_path):
    model = attach_quantizer_(quantize_(build(tied=True), group_size=32))
    model.requires_grad_(False)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(8)]
    make = lambda: transformers.Trainer(model=model, args=arguments, train_dataset=data)
    with pytest.raises(ValueError, match="purely quantized"):  # nothing of it trains
        make()
    thaw_levels_(model)
    trainer = make()
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert_same(model, load(tmp_path / "checkpoint-3"))


def test_a_base_model_loads_from_the_folder_of_a_causal_one(tmp_path):
    model = quantize_(build(), group_size=32)
    save_checkpoint(model, tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert_same(base, model.model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"group_size": 48}, "group_size must be 32, 64 or 128, got 48"),
        ({"bits": 2}, "bits must be 1 and mode affine, got 2"),
        ({"mode": "mxfp4"}, "bits must be 1 and mode affine, got 1 and 'mxfp4'"),
        ({"method": "calibrated"}, "method must be one of"),
        ({"other_bits": "no"}, "other_bits must be one of error, dequantize, got 'no'"),
        ({"method": "mean", "symmetric": True}, "method must be one of .* for symmetric weights"),
    ],
)
def test_config_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        OneBitConfig(**options)


@pytest.mark.parametrize("tied", [False, True])
def test_dequantize_makes_a_model_that_is_saved_as_a_float_one(tied, tmp_path):
    model = attach_quantizer_(quantize_(build(tied=tied), group_size=32))
    logits = model(IDS).logits
    with pytest.raises(CheckpointError, match=r"1-bit layers, got none: model.dequantize\(\)"):
        dequantize_(copy.deepcopy(model)).save_pretrained(tmp_path)
    model.dequantize().save_pretrained(tmp_path)
    again = load(tmp_path)
    assert not hasattr(again.config, "quantization")
    assert type(again.lm_head) is nn.Linear
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    torch.testing.assert_close(again(IDS).logits, logits, rtol=0, atol=1e-5)


def test_attach_names_what_is_wrong():
    with pytest.raises(ValueError, match="model must be of transformers, got Linear"):
        attach_quantizer_(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="model must have 1-bit layers, got none"):
        attach_quantizer_(build())


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "pad_token_id": 0,
}
PIXELS = {"pixel_values": torch.zeros(1, 3, 16, 16)}
WHISPER = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": 80,
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}
SPEECH = {"input_features": torch.zeros(1, 8, 16), "decoder_input_ids": IDS}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 80}

# model_type, class of Auto, sizes, inputs, layers not to convert, 1-bit layers, what holds matrices
# that stay float
SCALED = {"GemmaTextScaledWordEmbedding", "Linear"}
VIT = {**SMALL, "image_size": 16, "patch_size": 8}
SOUND = {"Conv1d", "Embedding", "WhisperPositionalEmbedding"}
ARCHITECTURES = [
    ("llama", "CausalLM", SMALL, {}, [], 16, set()),
    ("mistral", "CausalLM", SMALL, {}, [], 16, set()),
    ("qwen2", "CausalLM", SMALL, {}, [], 16, set()),
    ("qwen3", "CausalLM", {**SMALL, "head_dim": 32}, {}, [], 16, set()),
    ("phi", "CausalLM", SMALL, {}, [], 14, set()),
    ("qwen3_moe", "CausalLM", {**SMALL, **MOE, "head_dim": 32}, {}, [], 16, {"Qwen3MoeTopKRouter"}),
    ("gemma", "CausalLM", {**SMALL, "head_dim": 32}, {}, [], 14, SCALED),
    ("gpt2", "CausalLM", GPT2, {}, [], 11, set()),
    ("bert", "MaskedLM", SMALL, {}, [], 17, set()),
    ("albert", "MaskedLM", {**SMALL, "embedding_size": 32}, {}, [], 12, set()),
    ("vit", "ImageClassification", VIT, PIXELS, [], 13, {"Conv2d", "ViTEmbeddings"}),
    ("whisper", "SpeechSeq2Seq", WHISPER, SPEECH, ["embed_positions"], 18, SOUND),
]


@pytest.mark.parametrize(
    "kind, auto, sizes, inputs, skip, layers, left",
    ARCHITECTURES,
    ids=[a[0] for a in ARCHITECTURES],
)
def test_architectures(kind, auto, sizes, inputs, skip, layers, left, tmp_path):
    """Tiny random models, quantized on load, saved and loaded: what is swapped and what is not."""
    maker = getattr(transformers, f"AutoModelFor{auto}")
    config = transformers.AutoConfig.for_model(kind, **sizes)
    maker.from_config(config).save_pretrained(tmp_path / "dense")
    quantization = OneBitConfig(group_size=32, modules_to_not_convert=skip)
    model = maker.from_pretrained(tmp_path / "dense", quantization_config=quantization)
    swapped = [m for m in model.modules() if isinstance(m, OneBitModule)]
    matrices = {
        type(module).__name__
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if p.dim() > 1 and not isinstance(module, OneBitModule)
    }
    output = model(**(inputs or {"input_ids": IDS})).logits
    assert torch.isfinite(output).all()
    model.save_pretrained(tmp_path / "onebit")
    again = maker.from_pretrained(tmp_path / "onebit")
    assert_same(model, again)
    assert torch.equal(output, again(**(inputs or {"input_ids": IDS})).logits)
    assert (len(swapped), matrices) == (layers, left)


@pytest.mark.skipif(not torch.ops.onebit.can_prepack(), reason="no kernels of prepacked weights")
@pytest.mark.parametrize("tied", [False, True])
def test_prepacked_models_generate_and_save_as_the_others(tied, tmp_path):
    model = quantize_(build(tied=tied), group_size=32, skip=[])
    logits, words = model(IDS).logits, model.generate(IDS, max_new_tokens=3, do_sample=False)
    prepack_(model)
    torch.testing.assert_close(model(IDS).logits, logits)
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), words)
    attach_quantizer_(model)
    model.save_pretrained(tmp_path)
    assert sum(isinstance(m, PrepackedLinear) for m in model.modules()) == 2 * 7 + (not tied)
    assert_same(load(tmp_path), model)
    torch.testing.assert_close(load_checkpoint(tmp_path, model)(IDS).logits, logits)
