"""Code that reads the weight of a layer instead of calling it: each works, raises, or is left."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import fuse_linear_bn_eval, parametrizations

from torch_onebit import (
    OneBitLinear,
    QATLinear,
    add_lora_,
    calibrate_,
    convert_,
    prepare_qat_,
    quantize_,
    report,
)


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(64, 2, 100, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2).eval()


SRC = torch.randn(2, 5, 64)
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
STEPS = {
    "quantize_": lambda m: quantize_(m, group_size=32),
    "calibrate_": lambda m: calibrate_(m, [SRC], group_size=32, progress=False),
    "prepare_qat_": lambda m: prepare_qat_(m, group_size=32),
    "convert_": lambda m: convert_(prepare_qat_(m, group_size=32)),
    "add_lora_": lambda m: add_lora_(quantize_(m, group_size=32)),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded, nested inside"])
def test_fused_encoder_kernels_are_declined(step, mask):
    """In eval without grad PyTorch would read linear1.weight; training mode never does."""
    model = STEPS[step](encoder())
    assert type(model.layers[0].linear1) is not nn.Linear
    expected = model.train()(SRC, src_key_padding_mask=mask).detach()
    model.eval()
    keep = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = model(SRC, src_key_padding_mask=mask)
        torch.testing.assert_close(y[keep], expected[keep], rtol=1e-4, atol=1e-5)
    model.requires_grad_(False)
    y = model(SRC, src_key_padding_mask=mask)
    torch.testing.assert_close(y[keep], expected[keep], rtol=1e-4, atol=1e-5)


def test_a_layer_put_in_by_hand_and_copies_decline_too():
    layer = encoder().layers[0]
    layer.linear1 = QATLinear(layer.linear1, group_size=32)
    expected = layer(SRC).detach()
    with torch.no_grad():
        torch.testing.assert_close(layer(SRC), expected)
        torch.testing.assert_close(copy.deepcopy(layer)(SRC), expected)


def test_hooks_of_a_float_layer_go_along_and_can_be_removed():
    model, seen = encoder(), []
    handle = model.layers[0].linear1.register_forward_hook(lambda m, a, y: seen.append(type(m)))
    quantize_(model, group_size=32)
    expected = model.train()(SRC).detach()
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(SRC), expected, rtol=1e-4, atol=1e-5)
    assert seen == [OneBitLinear]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 32))


LEFT = {  # a module whose matrices stay float, and what the report says of them
    "attention": (lambda: nn.MultiheadAttention(32, 2), "nn.MultiheadAttention reads its weights"),
    "attention's projection": (lambda: nn.MultiheadAttention(32, 2), "class of its own"),
    "lstm": (lambda: nn.LSTM(32, 32), "nn.LSTM hands its weights to one kernel"),
    "convolution": (lambda: nn.Conv1d(32, 8, 3), "convolutions have no 1-bit form"),
    "bag": (lambda: nn.EmbeddingBag(8, 32), "EmbeddingBag is a class of its own"),
    "experts": (Experts, "a parameter of 3 dimensions"),
    "old weight_norm": (
        lambda: nn.utils.weight_norm(nn.Linear(32, 8)),
        "its weight is computed when it is called",
    ),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(32, 8)),
        "parametrized: only prepare_qat_ takes it",
    ),
    "max_norm": (lambda: nn.Embedding(8, 32, max_norm=1.0), "max_norm rewrites rows"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("what", LEFT)
def test_what_cannot_be_swapped_is_left_and_listed(what):
    make, reason = LEFT[what]
    inner = make()
    before = dict(inner.state_dict())
    with pytest.warns(UserWarning, match="quantize_ swapped nothing"):
        model = quantize_(nn.ModuleList([inner]), group_size=32)
    found = report(model)
    assert any(reason in row.reason for row in found.left), found
    assert found.bytes_left == sum(p.numel() * 4 for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in inner.state_dict().items())


RAISE = {  # what would take packed words for numbers
    "fuse_linear_bn_eval": (
        lambda layer: fuse_linear_bn_eval(layer.eval(), nn.BatchNorm1d(8).eval()),
        "weight must be packed words",
    ),
    "xavier_uniform_": (lambda layer: nn.init.xavier_uniform_(layer.weight), "Int"),
    "multi_head_attention_forward": (
        lambda layer: nn.functional.linear(torch.randn(2, 32), layer.weight),
        "dtype|shapes",
    ),
    "prune": (lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5), ""),
    "weight_norm": (lambda layer: parametrizations.weight_norm(layer), ""),
    "spectral_norm": (lambda layer: parametrizations.spectral_norm(layer), ""),
}


@pytest.mark.parametrize("what", RAISE)
def test_words_are_never_taken_for_numbers(what):
    call, message = RAISE[what]
    layer = OneBitLinear(32, 8, group_size=32)
    words = layer.weight.clone()
    with pytest.raises(Exception, match=message):
        call(layer)
    assert torch.equal(layer.weight, words)


@pytest.mark.parametrize("grad", [False, True])
def test_a_packed_projection_put_into_attention_raises(grad):
    """PyTorch reads out_proj.weight: quantize_ leaves it, and by hand it is no silent mistake."""
    attention = nn.MultiheadAttention(64, 2, batch_first=True).train(grad)
    attention.out_proj = OneBitLinear.from_linear(attention.out_proj, group_size=32)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="Float and Int"):
        attention(SRC, SRC, SRC)


def test_batch_norm_is_fused_into_latent_weights_whose_levels_follow():
    layer = QATLinear(nn.Linear(32, 8), method="mean", group_size=32).eval()
    norm = nn.BatchNorm1d(8).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    x = torch.randn(4, 32)
    torch.testing.assert_close(fuse_linear_bn_eval(layer, norm)(x), norm(layer(x)))


TIED = {  # what stays float: what transformers' tie_weights says
    "lm_head": "cannot assign 'torch.IntTensor' as parameter 'weight'",
    "embed_tokens": "weight must be packed words, no Parameter",
}


@pytest.mark.parametrize("stays", TIED)
def test_words_are_never_tied_to_floats(stays):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = quantize_(transformers.LlamaForCausalLM(config), group_size=32, skip=[stays])
    with pytest.raises(TypeError, match=TIED[stays]):
        model.tie_weights()


def test_a_head_whose_embedding_stays_says_that_it_is_no_longer_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 32), "head": nn.Linear(32, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    quantize_(model, group_size=32, skip=["embed"])
    assert report(model).layers[0].note == "no longer tied to embed, which stays"


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("how", ["quantize_", "calibrate_", "prepare_qat_", "convert_"])
def test_gpt2_with_its_conv1d(how):
    model, ids = gpt2(), torch.arange(12).view(1, 12)
    before = model(ids).logits.detach()
    if how == "calibrate_":
        calibrate_(model, [{"input_ids": ids}], group_size=32, skip=["wte", "lm_head", "wpe"])
    else:
        parameters = {id(p) for p in model.parameters()}
        steps = {"quantize_": quantize_, "prepare_qat_": prepare_qat_, "convert_": prepare_qat_}
        steps[how](model, group_size=32, skip=["wte", "lm_head", "wpe"])
        if how == "prepare_qat_":
            assert {id(p) for p in model.parameters()} == parameters
    y = model(ids).logits
    if how == "convert_":
        torch.testing.assert_close(convert_(model)(ids).logits, y, rtol=1e-3, atol=1e-4)
    names = [row.name for row in report(model).layers]
    assert "transformer.h.0.attn.c_attn" in names and "transformer.h.1.mlp.c_proj" in names
    assert (y.detach() - before).norm() < 2 * before.norm()


def test_embeddings_of_transformers_are_not_resized_silently():
    model = gpt2()
    quantize_(model, group_size=32)
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(Exception, match=r"Embedding|embedding"):
        model.resize_token_embeddings(50)


def test_adapters_of_peft_stay_float():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)),
        peft.LoraConfig(target_modules=["0", "1"], r=4),
    )
    quantize_(model, group_size=32)
    found = report(model)
    assert len(found.layers) == 2 and all("base_layer" in row.name for row in found.layers)
    assert sum(row.reason == "an adapter of peft, trained in float" for row in found.left) == 4
