"""OneBitLinear and OneBitEmbedding: drop-ins that survive everything a training script does to
them."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from torch_onebit import OneBitEmbedding, OneBitLinear
from torch_onebit.nn import tie

OPTIONS = [
    {},
    {"bias": False},
    {"group_size": 32},
    {"symmetric": True},
    {"dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_linear_computes_with_its_dequantized_weights(options):
    layer = OneBitLinear(128, 70, **options)
    x = torch.randn(2, 5, 128).to(layer.scales.dtype)
    bias = None if layer.bias is None else layer.bias.double()
    expected = nn.functional.linear(x.double(), layer.dequantize().double(), bias)
    assert layer(x).dtype == x.dtype
    torch.testing.assert_close(layer(x).double(), expected, rtol=2e-2, atol=2e-2)


def test_linear_starts_like_nn_linear():
    layer, plain = OneBitLinear(1024, 64), nn.Linear(1024, 64)
    assert layer.dequantize().std().item() == pytest.approx(plain.weight.std().item(), rel=0.05)
    assert abs(layer.dequantize().mean().item()) < 1e-3
    assert layer.bias.abs().max() <= 1 / 32


def test_only_the_bias_trains_until_levels_are_thawed():
    layer = OneBitLinear(128, 8)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    layer.requires_grad_()
    layer(torch.randn(3, 128)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert layer.weight.grad is None


def test_binary_weights_convert_exactly():
    linear = nn.Linear(256, 40)
    with torch.no_grad():
        linear.weight.copy_(torch.where(linear.weight > 0, 0.5, -0.25))
    for symmetric, expected in ((False, linear.weight), (True, None)):
        layer = OneBitLinear.from_linear(linear, symmetric=symmetric)
        if expected is not None:
            assert torch.equal(layer.dequantize(), expected)
        assert layer.bias is linear.bias
        assert torch.equal(layer.dequantize() > 0, linear.weight > 0)
        back = layer.to_linear()
        assert torch.equal(back.weight, layer.dequantize())
        assert back.bias is linear.bias
        assert back.weight.requires_grad


def test_packed_tensors_make_a_layer_without_a_copy():
    made = OneBitLinear(128, 8, group_size=64)
    tensors = made.weight.view(torch.uint32), made.scales, made.biases
    layer = OneBitLinear.from_packed(*tensors, made.bias, group_size=64)
    assert (layer.in_features, layer.out_features, layer.symmetric) == (128, 8, False)
    assert layer.weight.dtype == torch.int32
    assert layer.weight.data_ptr() == made.weight.data_ptr()
    assert layer.scales.data_ptr() == made.scales.data_ptr() and not layer.scales.requires_grad
    assert layer.bias is made.bias
    x = torch.randn(2, 128)
    assert torch.equal(layer(x), made(x))
    symmetric = OneBitLinear.from_packed(made.weight, made.scales.detach(), None, group_size=64)
    assert symmetric.symmetric and symmetric.bias is None and not symmetric.scales.requires_grad
    rows = OneBitEmbedding.from_packed(*tensors, 3, group_size=64)
    assert (rows.num_embeddings, rows.embedding_dim, rows.padding_idx) == (8, 128, 3)
    assert torch.equal(rows(torch.tensor([1, 7])), made.dequantize()[[1, 7]])


WORDS, SCALES = torch.zeros(8, 4, dtype=torch.int32), torch.ones(8, 2)
NOT_PACKED = [
    ((WORDS.long(), SCALES, None), ValueError, "weight must be int32 or uint32, got torch.int64"),
    ((WORDS[0], SCALES, None), ValueError, "weight must have 2 dimensions, got 1"),
    ((WORDS[:, :3], SCALES, None), ValueError, "weight must have a last dimension of whole .* 3"),
    ((WORDS, SCALES[:, :1], None), ValueError, r"scales must have shape \[8, 2\], got \[8, 1\]"),
    ((WORDS, SCALES.int(), None), ValueError, "scales must be float32, .* got torch.int32"),
    ((WORDS, SCALES, SCALES[:7]), ValueError, r"biases must have shape \[8, 2\], got \[7, 2\]"),
    ((WORDS, SCALES, SCALES.half()), ValueError, "biases must have the dtype of scales"),
    ((WORDS, None, None), TypeError, "scales must be a tensor, got NoneType"),
]


@pytest.mark.parametrize("tensors, error, message", NOT_PACKED, ids=[r[2] for r in NOT_PACKED])
@pytest.mark.parametrize("cls", [OneBitLinear, OneBitEmbedding])
def test_tensors_of_another_format_are_refused(cls, tensors, error, message):
    with pytest.raises(error, match=message):
        cls.from_packed(*tensors, group_size=64)


def test_importance_weighs_the_rows_of_an_embedding():
    embedding, importance = nn.Embedding(4, 64), torch.rand(64)
    layer = OneBitEmbedding.from_embedding(embedding, group_size=64, importance=importance)
    linear = nn.Linear(64, 4)
    linear.weight = embedding.weight
    weighed = OneBitLinear.from_linear(linear, group_size=64, importance=importance)
    assert torch.equal(layer.dequantize(), weighed.dequantize())


CASTS = [
    ("half", lambda m: m.half(), torch.float16),
    ("bfloat16", lambda m: m.bfloat16(), torch.bfloat16),
    ("to double", lambda m: m.to(torch.float64), torch.float64),
    ("to device and dtype", lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
]


@pytest.mark.parametrize("name, cast, dtype", CASTS, ids=[row[0] for row in CASTS])
def test_casting_leaves_the_packed_words_alone(name, cast, dtype):
    layer = OneBitLinear(128, 8)
    words = layer.weight.clone()
    cast(layer)
    assert layer.weight.dtype == torch.int32
    assert torch.equal(layer.weight, words)
    assert layer.scales.dtype == layer.biases.dtype == layer.bias.dtype == dtype
    assert layer(torch.randn(2, 128, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("symmetric", [False, True])
def test_result_has_the_dtype_of_x_whatever_the_levels_are(symmetric):
    layer = OneBitLinear(128, 8, dtype=torch.float16, symmetric=symmetric)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert layer(torch.randn(2, 128).to(dtype)).dtype == dtype


def save_and_load(layer: nn.Module, how: str, path) -> nn.Module:
    """A second layer with the state of the first, through one of the ways people use."""
    if how == "deepcopy":
        return copy.deepcopy(layer)
    if how == "pickle":
        return pickle.loads(pickle.dumps(layer))
    if how == "torch.save":
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)
    if how == "meta and assign":
        with torch.device("meta"):
            fresh = OneBitLinear(128, 8)
        fresh.load_state_dict(layer.state_dict(), assign=True)
        return fresh
    fresh = OneBitLinear(128, 8)
    if how == "state_dict":
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    elif how == "uint32 as in MLX":
        state = layer.state_dict()
        state["weight"] = state["weight"].view(torch.uint32)
        fresh.load_state_dict(state)
        assert state["weight"].dtype == torch.uint32  # the caller's dict stays as it was
    elif how == "uint32 and assign":
        state = layer.state_dict()
        state["weight"] = state["weight"].view(torch.uint32)
        fresh.load_state_dict(state, assign=True)
        assert fresh.weight.data_ptr() == layer.weight.data_ptr()  # viewed, not copied
    else:
        save_file(layer.state_dict(), path / "layer.safetensors")
        fresh.load_state_dict(load_file(path / "layer.safetensors"))
    return fresh


@pytest.mark.parametrize(
    "how",
    [
        "deepcopy",
        "pickle",
        "torch.save",
        "state_dict",
        "meta and assign",
        "uint32 as in MLX",
        "uint32 and assign",
        "safetensors",
    ],
)
def test_layer_survives(how, tmp_path):
    layer = OneBitLinear(128, 8)
    x = torch.randn(3, 128)
    loaded = save_and_load(layer, how, tmp_path)
    assert loaded.weight.dtype == torch.int32
    assert not loaded.scales.requires_grad
    assert torch.equal(loaded(x), layer(x))


def test_meta_layer_can_be_materialized():
    layer = OneBitLinear(128, 8, device="meta")
    assert layer(torch.randn(3, 128, device="meta")).shape == (3, 8)
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(layer(torch.randn(3, 128))).all()


def test_autocast_computes_in_bfloat16():
    layer, plain = OneBitLinear(128, 8), nn.Linear(128, 8)
    x = torch.randn(3, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == plain(x).dtype == torch.bfloat16
        assert layer(x.double()).dtype == torch.float64  # autocast leaves float64 alone
    torch.testing.assert_close(layer(x).bfloat16(), layer(x.bfloat16()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
def test_embedding_looks_up_rows(padding_idx):
    layer = OneBitEmbedding(10, 64, padding_idx, group_size=64)
    indices = torch.tensor([[1, 3], [9, 0]])
    assert torch.equal(layer(indices), layer.dequantize()[indices])
    x = torch.randn(2, 64)
    torch.testing.assert_close(layer.as_linear(x), x @ layer.dequantize().T)


def test_padding_row_starts_at_zero_and_gets_no_gradient():
    layer = OneBitEmbedding(10, 64, 3, group_size=64).requires_grad_()
    assert not layer(torch.tensor([3])).any()
    layer(torch.tensor([3, 1, 3])).sum().backward()
    assert not layer.scales.grad[3].any()
    assert layer.biases.grad[1].any()


def test_padding_row_of_a_quantized_embedding_stays_zero():
    layer = OneBitEmbedding.from_embedding(nn.Embedding(10, 64, padding_idx=0), group_size=32)
    assert layer.padding_idx == 0
    assert not layer(torch.tensor([0])).any()
    assert layer.to_embedding().padding_idx == 0


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"embed": OneBitEmbedding(8, 64, group_size=64), "head": None})
    model["head"] = OneBitLinear(64, 8, bias=False, group_size=64)
    tie(model["embed"], model["head"])
    return model


MOVES = [
    ("to meta", lambda m: m.to("meta")),
    ("half", lambda m: m.half()),
    ("deepcopy", copy.deepcopy),
    ("pickle", lambda m: pickle.loads(pickle.dumps(m))),
    ("deepcopy, to meta, twice", lambda m: copy.deepcopy(copy.deepcopy(m).to("meta")).double()),
]


@pytest.mark.parametrize("name, move", MOVES, ids=[row[0] for row in MOVES])
def test_tied_weights_stay_tied(name, move):
    model = move(tied())
    assert model["embed"].weight is model["head"].weight
    assert model["embed"].scales is model["head"].scales


def test_tied_model_round_trips_through_safetensors(tmp_path):
    model, fresh = tied(), tied()
    save_model(model, tmp_path / "model.safetensors")
    load_model(fresh, tmp_path / "model.safetensors")
    x = torch.randn(2, 64)
    assert torch.equal(fresh["head"](x), model["head"](x))
    assert torch.equal(fresh["embed"].as_linear(x), model["head"](x))


ERRORS = [
    (lambda: OneBitLinear(128, 8, group_size=96), "group_size must be 32, 64 or 128, got 96"),
    (
        lambda: OneBitEmbedding(8, 64, 8, group_size=64),
        "padding_idx must be an integer within the 8 rows",
    ),
    (
        lambda: OneBitEmbedding.from_embedding(nn.Embedding(4, 128, max_norm=1.0)),
        "embedding must have no max_norm, got 1.0",
    ),
    (
        lambda: tie(OneBitLinear(128, 8), OneBitLinear(128, 9)),
        r"second must have packed weights \[8, 4\] in groups of 128, got \[9, 4\]",
    ),
    (
        lambda: tie(OneBitLinear(128, 8), OneBitLinear(128, 8, symmetric=True)),
        "second must have symmetric=False, got symmetric=True",
    ),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=[row[1] for row in ERRORS])
def test_illegal_layer_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_repr_says_what_matters():
    text = repr(OneBitLinear(128, 8, group_size=64))
    assert "in_features=128, out_features=8, bias=True, group_size=64, symmetric=False" in text
    assert "10, 64, padding_idx=3, group_size=64" in repr(OneBitEmbedding(10, 64, 3, group_size=64))
