"""Heads of transformers' models stay float unless somebody asks, whatever makes the model 1-bit."""

import pytest
import torch
from torch import nn

from torch_onebit import OneBitModule, calibrate_, convert_, prepare_qat_, quantize_, report
from torch_onebit.heads import HEAD, TIED

transformers = pytest.importorskip("transformers")
from torch_onebit.transformers import OneBitConfig  # noqa: E402

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
T5 = {"d_model": 64, "d_ff": 64, "d_kv": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 96}
IDS = torch.arange(8).view(1, 8)


def made(kind, config, **sizes):
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()


def llama(tied):
    return made("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=tied, **SIZES)


class Wrapped(nn.Module):
    """A language model inside a module of somebody's own."""

    def __init__(self):
        super().__init__()
        self.lm, self.more = llama(False), nn.Linear(96, 32)

    def forward(self, input_ids):
        return self.more(self.lm(input_ids).logits)


MODELS = {  # why, the model, and what of it stays
    "a language model": (lambda: llama(False), {"lm_head"}),
    "whose head is its embedding": (lambda: llama(True), {"lm_head", "model.embed_tokens"}),
    "a head of several layers": (
        lambda: made("BertForMaskedLM", "BertConfig", tie_word_embeddings=False, **SIZES),
        {"cls.predictions.transform.dense", "cls.predictions.decoder"},
    ),
    "a classifier": (
        lambda: made("BertForSequenceClassification", "BertConfig", **SIZES),
        {"classifier"},
    ),
    "no base model of its own": (
        lambda: made("T5ForConditionalGeneration", "T5Config", **T5),
        {"lm_head", "shared", "encoder.embed_tokens", "decoder.embed_tokens"},
    ),
    "a base model": (lambda: made("BertModel", "BertConfig", **SIZES), set()),
    "inside another model": (Wrapped, {"lm.lm_head"}),
    "no model of transformers": (lambda: nn.Sequential(nn.Embedding(96, 64)), set()),
}


def calibrated(model, **options):
    x = {"input_ids": IDS} if not isinstance(model, nn.Sequential) else IDS
    x = x | {"decoder_input_ids": IDS} if "T5" in type(model).__name__ else x
    return calibrate_(model, [x], progress=False, **options)


STEPS = {"quantize_": quantize_, "calibrate_": calibrated, "prepare_qat_": prepare_qat_}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("which", MODELS)
def test_heads_and_what_is_tied_to_them_stay(which, step):
    make, stays = MODELS[which]
    model = STEPS[step](make(), group_size=32)
    left = {row.name: row.reason for row in report(model).left if row.reason in (HEAD, TIED)}
    floats = {n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)}
    read = {n for n in floats if n.endswith(".wo")}  # T5 reads its dtype
    assert floats - read == stays
    assert left.keys() <= stays and bool(left) == bool(stays)


@pytest.mark.parametrize("step", STEPS)
def test_whoever_asks_gets_everything(step):
    options = {"group_size": 32}
    for chosen in ({"skip": []}, {"filter_fn": lambda m, name: True}):
        model = STEPS[step](llama(True), **options, **chosen)
        assert not any(type(m) in (nn.Linear, nn.Embedding) for m in model.modules())
    model = STEPS[step](llama(False), **options, skip=["embed_tokens"])
    assert type(model.lm_head) is not nn.Linear and type(model.model.embed_tokens) is nn.Embedding


def test_layers_that_are_1_bit_already_train_whatever_they_are():
    model = prepare_qat_(quantize_(llama(True), group_size=32, skip=[]))
    assert report(model).layers[0].kind == "QATEmbedding"
    assert isinstance(convert_(model).lm_head, OneBitModule)


@pytest.mark.parametrize("which", ["a language model", "whose head is its embedding"])
def test_on_load_the_same_layers_stay(which, tmp_path):
    make, stays = MODELS[which]
    make().save_pretrained(tmp_path)
    config = OneBitConfig(group_size=32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    names = {n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)}
    assert names == stays
