"""Models of transformers on devices and the disk, in pipelines, compiled while they generate."""

import copy
from functools import cache

import pytest
import torch
from test_transformers import IDS, MOE, assert_same, build
from torch import nn

from torch_onebit import load_checkpoint, quantize_, save_checkpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from torch_onebit.transformers import OneBitConfig, attach_quantizer_  # noqa: E402

MIX = {**MOE, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
MODELS = {"plain": ("qwen2", {}), "tied": ("qwen2", {"tied": True}), "experts": ("qwen3_moe", MIX)}
PARTS = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
DISK = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}
ON_LOAD = {"quantization_config": OneBitConfig(group_size=32, modules_to_not_convert=[])}


@cache
def float_model(name: str) -> nn.Module:
    kind, sizes = MODELS[name]
    return build(kind, **sizes)


def onebit(name: str) -> nn.Module:
    return attach_quantizer_(quantize_(copy.deepcopy(float_model(name)), group_size=32, skip=[]))


PLACES = [
    # device_map, options, why
    ("auto", {}, "what most scripts say"),
    ("cpu", {}, "one device"),
    ({"": "cpu"}, {}, "the same in accelerate's words"),
    (DISK, {}, "a block on the disk: its levels are loaded at every call, its words stay"),
    (DISK, {"offload_buffers": True}, "its words are loaded too"),
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device_map, options, why", PLACES, ids=[p[2] for p in PLACES])
def test_device_maps(name, device_map, options, why, tmp_path):
    model = onebit(name)
    model.save_pretrained(tmp_path / "onebit")
    float_model(name).save_pretrained(tmp_path / "float")
    load = transformers.AutoModelForCausalLM.from_pretrained
    options = {"device_map": device_map, "offload_folder": tmp_path / "offload", **options}
    logits = model(IDS).logits
    placed = [load(tmp_path / "onebit", **options)]
    if options.get("offload_buffers"):
        with pytest.raises(ValueError, match="offload_buffers must be False where a model is"):
            load(tmp_path / "float", **options, **ON_LOAD)
    else:
        placed.append(load(tmp_path / "float", **options, **ON_LOAD))
    for number, other in enumerate(placed):
        for _ in range(2):
            assert torch.equal(other(IDS).logits, logits)
        other.save_pretrained(tmp_path / f"again{number}")
        assert_same(load(tmp_path / f"again{number}"), model)


@pytest.mark.parametrize("name", ["plain", "experts"])
def test_generate_compiles_once_in_one_graph_over_a_static_cache(name):
    model = onebit(name)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(IDS, **options)
    config = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None, dynamic=False)
    config._compile_all_devices = True  # transformers leaves the CPU alone otherwise
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    static = model.generate(IDS, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(static, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def tokenizer():
    """Words that are numbers, without a file to download."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({str(i): i for i in range(80)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")


def test_a_pipeline_generates_text(tmp_path):
    model = onebit("tied")
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    text = pipe("1 2 3", **options)[0]["generated_text"]
    expected = model.generate(torch.tensor([[1, 2, 3]]), **options)[0]
    assert text.replace(" ", "") == "".join(str(int(i)) for i in expected)


def test_a_tied_model_made_empty_and_filled_by_assignment_stays_tied():
    from accelerate import init_empty_weights

    model = onebit("tied")
    with init_empty_weights(include_buffers=True):
        empty = quantize_(build(*MODELS["tied"][:1], tied=True), group_size=32, skip=[])
    assert empty.lm_head.weight.is_meta
    empty.load_state_dict(model.state_dict(), assign=True)
    for key in ("weight", "scales", "biases"):
        own, other = (getattr(m, key) for m in (empty.lm_head, empty.model.embed_tokens))
        assert own.data_ptr() == other.data_ptr(), key
    assert_same(empty, model)


def test_a_tied_model_made_empty_loads_a_folder_and_stays_tied(tmp_path):
    from accelerate import init_empty_weights

    model = onebit("tied")
    save_checkpoint(model, tmp_path)
    with init_empty_weights():  # which makes two parameters of one
        empty = build(*MODELS["tied"][:1], tied=True)
    load_checkpoint(tmp_path, empty)
    assert empty.lm_head.weight.data_ptr() == empty.model.embed_tokens.weight.data_ptr()
    assert_same(empty, model)
