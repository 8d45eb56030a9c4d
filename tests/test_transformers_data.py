"""calibrate_ and 1-bit training of models of transformers, with batches as users have them."""

import copy

import pytest
import torch
from test_transformers import MOE, SMALL, assert_same, build
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_onebit import (
    OneBitEmbedding,
    OneBitLinear,
    calibrate_,
    convert_,
    load_checkpoint,
    prepare_qat_,
    quantize_,
    report,
    save_checkpoint,
)

transformers = pytest.importorskip("transformers")

from torch_onebit.transformers import OneBitConfig, attach_quantizer_  # noqa: E402

Encoding = transformers.BatchEncoding
ALL = {"group_size": 32, "skip": []}  # heads too
IDS = [torch.randint(0, 80, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]
MASKED = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in IDS]
ROWS = [{name: t[row] for name, t in batch.items()} for batch in MASKED for row in range(2)]

BATCHES = {
    "tensors": IDS,
    "dicts": MASKED,
    "encodings of a tokenizer": [Encoding(batch) for batch in MASKED],
    "with labels": [{**batch, "labels": batch["input_ids"]} for batch in MASKED],
    "a loader of dicts": DataLoader(ROWS, batch_size=2),
    "a loader of tensors": DataLoader(TensorDataset(torch.cat(IDS)), batch_size=2),
}


def named(model: nn.Module, kind: type) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, kind)}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_calibrate_takes_batches_of_ids_and_finds_the_blocks(batches):
    torch.manual_seed(0)
    model = build("llama")
    expected = report(calibrate_(copy.deepcopy(model), [{"input_ids": i} for i in IDS], **ALL))
    found = report(calibrate_(model, batches, **ALL))
    assert found.calibration.chains == expected.calibration.chains == ("model.layers",)
    assert len(found.layers) == 16
    errors = [[row.output_error or 0 for row in r.layers] for r in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_a_batch_may_ask_for_a_cache():
    found = report(calibrate_(build("llama"), [{"input_ids": IDS[0], "use_cache": True}], **ALL))
    assert found.calibration.chains == ()
    assert len(found.layers) == 16


GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 80}
KINDS = [
    # model_type, class of Auto, sizes, chains, whether head and embedding are tied
    ("llama", "CausalLM", SMALL, ["model.layers"], False),
    ("qwen2", "CausalLM", {**SMALL, "tie_word_embeddings": True}, ["model.layers"], True),
    ("gpt2", "CausalLM", GPT2, ["transformer.h"], True),
    ("bert", "MaskedLM", SMALL, ["bert.encoder.layer"], True),
    ("albert", "MaskedLM", {**SMALL, "embedding_size": 32}, [], True),
    ("qwen3_moe", "CausalLM", {**SMALL, **MOE, "head_dim": 32}, ["model.layers"], False),
]


def make(kind: str, auto: str, sizes: dict) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **sizes}
    )
    return getattr(transformers, f"AutoModelFor{auto}").from_config(config).eval()


@pytest.mark.parametrize("kind, auto, sizes, chains, tied", KINDS, ids=[k[0] for k in KINDS])
def test_calibrated_models_keep_ties_and_are_saved(kind, auto, sizes, chains, tied, tmp_path):
    model = make(kind, auto, sizes)
    found = report(calibrate_(model, MASKED, **ALL))
    assert list(found.calibration.chains) == chains
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, OneBitLinear)
    assert isinstance(embedding, OneBitEmbedding)
    assert (head.weight is embedding.weight) == tied
    left = [row for row in report(model).left if row.name.endswith("_proj")]
    assert {row.reason for row in left} <= {"experts: quantize_ and prepare_qat_ take them"}
    quantize_(model, group_size=32, filter_fn=lambda m, name: "experts" in name) if left else None
    logits = model(**MASKED[0]).logits
    attach_quantizer_(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(**MASKED[0]).logits, logits)


def test_gpt2_is_quantized_on_load_as_in_memory(tmp_path):
    model = make(*KINDS[2][:3])
    model.save_pretrained(tmp_path)
    config = OneBitConfig(group_size=32, modules_to_not_convert=[])
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    expected = quantize_(model, **ALL)
    assert_same(loaded, expected)
    save_checkpoint(loaded, tmp_path / "onebit")
    assert_same(load_checkpoint(tmp_path / "onebit"), expected)
    assert_same(type(model).from_pretrained(tmp_path / "onebit"), expected)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, labels=batch["input_ids"]).loss


@pytest.mark.parametrize(
    "kind, auto, sizes, chains, tied", KINDS[1:4], ids=[k[0] for k in KINDS[1:4]]
)
def test_qat_trains_ties_included_and_is_saved(kind, auto, sizes, chains, tied, tmp_path):
    model = prepare_qat_(make(kind, auto, sizes).train(), **ALL)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = loss_of(model, MASKED[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    convert_(model.eval())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(embedding, OneBitEmbedding)
    assert head.weight is embedding.weight
    logits = model(**MASKED[0]).logits
    attach_quantizer_(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(**MASKED[0]).logits, logits)
