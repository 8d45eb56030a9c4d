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
    dequantize_,
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


def test_calls_ask_for_hooks_without_running_python_and_find_those_there_are():
    layer, seen = OneBitLinear(64, 8), []
    assert type(layer._forward_hooks).__bool__ is bool and len(layer._forward_hooks) == 1
    handles = [layer.register_forward_hook(lambda *_, i=i: seen.append(i)) for i in range(2)]
    layer(torch.randn(64))
    for handle in handles:
        assert layer._forward_hooks
        handle.remove()
    layer(torch.randn(64))
    assert seen == [0, 1] and not layer._forward_hooks and len(layer._forward_hooks) == 1


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


def scaling_norm(rows):
    """What norms are fused by: positive, negative and zero factors."""
    norm = nn.BatchNorm1d(rows).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-2, 2, rows).round())
        norm.bias.normal_()
    return norm


FUSED = {  # how a QAT layer came about
    "mean": lambda linear: QATLinear(linear, method="mean", group_size=32),
    "learnable": lambda linear: QATLinear(linear, method="learnable", group_size=32),
    "symmetric": lambda linear: QATLinear(
        linear, method="learnable", group_size=32, symmetric=True
    ),
    "from packed": lambda linear: QATLinear(
        OneBitLinear.from_linear(linear, group_size=32), method="learnable", group_size=32
    ),
    "bfloat16": lambda linear: QATLinear(
        linear.bfloat16(), method="learnable", group_size=32
    ).float(),
}


@pytest.mark.parametrize("how", FUSED)
def test_batch_norm_is_fused_into_latent_weights_and_levels_follow(how):
    layer = FUSED[how](nn.Linear(64, 8)).eval()
    with torch.no_grad():
        if layer.scales is not None:  # trained: no longer those of the weights
            layer.scales.mul_(torch.empty_like(layer.scales).uniform_(0.5, 1.5))
    norm, x = scaling_norm(8), torch.randn(4, 64)
    expected = norm(layer(x))
    fused = fuse_linear_bn_eval(layer, norm)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm(layer(x)), expected)
    packed = convert_(nn.Sequential(fused))
    torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-4)


def test_a_weight_whose_levels_cannot_follow_is_no_silent_mistake():
    layer = QATLinear(nn.Linear(64, 8), method="learnable", group_size=32)
    with pytest.raises(ValueError, match="weight must have rows that are multiples"):
        layer.weight = nn.Parameter(torch.randn(8, 64))
    other = QATLinear(nn.Linear(64, 8), method="learnable", group_size=32)
    layer.load_state_dict(other.state_dict(), assign=True)  # brings its levels
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), other(x))
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    square = QATLinear(conv1d(64, 64), group_size=32).eval()
    with pytest.raises(ValueError, match="in a Conv1D"):
        fuse_linear_bn_eval(square, scaling_norm(64))


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
    quantize_(model, group_size=32, skip=[])
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


class TiedByHand(nn.Module):
    """A head that many a language model computes from its embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(16, 32), nn.Linear(32, 32)
        self.more = nn.Sequential(nn.Linear(32, 32))

    def forward(self, x):
        return self.inner(self.embed(x)) @ self.embed.weight.t()


class Aliased(TiedByHand):
    def forward(me, x):
        embed = me.embed
        return nn.functional.linear(me.inner(embed(x)), embed.weight)


class HandedOn(TiedByHand):
    def __init__(self):
        super().__init__()
        self.head = Head()

    def forward(self, x):
        return self.head(self.inner(self.embed(x)), embedding=self.embed)


class Head(nn.Module):
    def forward(self, x, embedding):
        return x @ embedding.weight.t()


class CastsToWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(16, 32), nn.ModuleList([nn.Linear(32, 32)])

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return x


typed = {"TiedByHand": TiedByHand}
exec(
    "class Typed(TiedByHand):\n"
    "    def forward(self, x):\n"
    "        return self.inner(self.embed(x)) @ self.embed.weight.t()",
    typed,
)
READERS = {  # a model, and which of its layers stay float
    "tied by hand": (TiedByHand, {"embed"}),
    "through a variable": (Aliased, {"embed"}),
    "handed on to a head": (HandedOn, {"embed"}),
    "casts to its dtype": (CastsToWeights, {"layers.0"}),
    "without source": (typed["Typed"], {"embed", "inner"}),
}


@pytest.mark.parametrize("step", ["quantize_", "prepare_qat_", "calibrate_"])
@pytest.mark.parametrize("which", READERS)
def test_layers_whose_weight_the_model_reads_stay_float(which, step):
    make, stay = READERS[which]
    model, x = make(), torch.arange(16).view(2, 8)
    if step == "calibrate_":
        calibrate_(model, [x], group_size=32, progress=False)
    else:
        {"quantize_": quantize_, "prepare_qat_": prepare_qat_}[step](model, group_size=32)
    kinds = {name for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)}
    assert kinds == stay
    assert all(r.reason.endswith("reads its weight") for r in report(model).left if r.name in stay)
    y = model(x)
    if step == "prepare_qat_":
        torch.testing.assert_close(convert_(model)(x), y)


def test_what_asks_for_shape_or_device_reads_nothing():
    class Asks(TiedByHand):
        def reset_parameters(self):
            nn.init.normal_(self.inner.weight)

        def forward(self, x):
            assert isinstance(self.inner.weight, torch.Tensor)
            x = x.to(self.embed.weight.device)
            return self.inner(self.embed(x)).view(*x.shape, self.inner.weight.shape[0])

    assert not [row for row in report(quantize_(Asks(), group_size=32)).left if row.kind]


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 48}
WIDE = SIZES | {"intermediate_size": 64}
OF_TRANSFORMERS = {  # config, auto class, sizes, and what of it is read, by the end of its name
    "casts to wo's dtype": (
        "T5",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 48},
        "wo",
    ),
    "multiplies by dt_proj": ("Mamba", "MambaForCausalLM", SIZES, "dt_proj"),
    "projects in F.multi_head_attention_forward": (
        "WavLM",
        "WavLMModel",
        WIDE | {"conv_dim": (32,), "conv_kernel": (4,), "conv_stride": (4,)},
        "q_proj",
    ),
    "hands its embedding to the head": (
        "Deberta",
        "DebertaForMaskedLM",
        WIDE | {"legacy": False},
        "word_embeddings",
    ),
    "joins the weights of its head": (
        "MobileBert",
        "MobileBertForMaskedLM",
        WIDE | {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        "predictions.decoder",
    ),
}


@pytest.mark.parametrize("which", OF_TRANSFORMERS)
def test_models_of_transformers_that_read_weights_work(which):
    """1-bit layers give what their dequantized twins give, so that nothing else is made of them."""
    transformers = pytest.importorskip("transformers")
    name, kind, sizes, read = OF_TRANSFORMERS[which]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**sizes)).eval()
    ids = torch.arange(12).view(1, 12)
    x = {"input_values": torch.randn(1, 400)} if name == "WavLM" else {"input_ids": ids}
    x |= {"decoder_input_ids": ids} if name == "T5" else {}
    trained = prepare_qat_(copy.deepcopy(model), group_size=32, skip=[])
    quantize_(model, group_size=32, skip=[])
    left = {row.name: row.reason for row in report(model).left}
    assert any(n.endswith(read) and "reads its weight" in why for n, why in left.items()), left
    y = trained(**x)[0]
    torch.testing.assert_close(convert_(trained)(**x)[0], y, rtol=1e-3, atol=1e-4)
    y = model(**x)[0]
    torch.testing.assert_close(dequantize_(model)(**x)[0], y, rtol=1e-3, atol=1e-4)
