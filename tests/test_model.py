"""quantize_ and dequantize_: what is swapped, what is left, and what stays shared."""

import pytest
import torch
from torch import nn

import torch_onebit
from torch_onebit import OneBitEmbedding, OneBitLinear, dequantize_, quantize_


class Model(nn.Module):
    """An embedding, two blocks, a layer the format cannot hold and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 128)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 128), nn.ReLU()) for _ in range(2))
        self.odd = nn.Linear(100, 128)
        self.head = nn.Linear(128, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, indices):
        h = self.embed(indices)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h + self.odd(h[..., :100]))


def kinds(model: nn.Module) -> dict[str, type]:
    layers = (nn.Linear, nn.Embedding, OneBitLinear, OneBitEmbedding)
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, layers)}


def test_every_layer_that_fits_is_swapped_in_place():
    model = Model()
    assert quantize_(model) is model
    assert kinds(model) == {
        "embed": OneBitEmbedding,
        "blocks.0.0": OneBitLinear,
        "blocks.1.0": OneBitLinear,
        "odd": nn.Linear,
        "head": OneBitLinear,
    }
    assert torch.isfinite(model(torch.arange(6).view(2, 3))).all()


def test_report_counts_layers_bits_and_bytes():
    report = quantize_(Model()).quantize_report
    assert [row.name for row in report.layers] == ["embed", "blocks.0.0", "blocks.1.0", "head"]
    weights = (50 + 128 + 128 + 50) * 128
    assert report.bytes_before == weights * 4
    assert report.bytes_after == weights // 8 + weights // 128 * 8
    assert report.bits_per_weight == pytest.approx(1.5)
    assert report.skipped == [("odd", "100 columns are not a multiple of group_size 128")]
    text = str(report)
    assert "4 layers, 1.500 bits per weight" in text
    assert "left as it was: odd (100 columns are not a multiple of group_size 128)" in text


FILTERS = [
    ("nothing", lambda m, n: False, {}, []),
    (
        "linear only",
        lambda m, n: isinstance(m, nn.Linear),
        {},
        ["blocks.0.0", "blocks.1.0", "head"],
    ),
    ("by name", lambda m, n: n.startswith("blocks.1"), {}, ["blocks.1.0"]),
    (
        "options per layer",
        lambda m, n: {"group_size": 32} if n == "head" else n == "embed",
        {"symmetric": True},
        ["embed", "head"],
    ),
]


@pytest.mark.parametrize("why, filter_fn, options, names", FILTERS, ids=[row[0] for row in FILTERS])
def test_filter_chooses_layers(why, filter_fn, options, names):
    model = quantize_(Model(), filter_fn=filter_fn, **options)
    swapped = [n for n, kind in kinds(model).items() if kind in (OneBitLinear, OneBitEmbedding)]
    assert swapped == names
    if why == "options per layer":
        assert (model.head.group_size, model.embed.group_size) == (32, 128)
        assert model.head.symmetric
        assert model.embed.symmetric


def test_tied_weights_stay_tied_both_ways():
    model = quantize_(Model(tied=True))
    assert model.head.weight is model.embed.weight
    assert model.head.scales is model.embed.scales
    weights = (50 + 128 + 128) * 128
    assert model.quantize_report.bytes_before == weights * 4
    assert model.quantize_report.bits_per_weight == pytest.approx(1.5)
    model.to("meta")
    assert model.head.weight is model.embed.weight
    model = dequantize_(quantize_(Model(tied=True)))
    assert model.head.weight is model.embed.weight


def test_a_layer_with_two_names_stays_one_layer():
    shared = nn.Linear(128, 128)
    model = quantize_(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2]
    assert len(model.quantize_report.layers) == 1


def test_dequantize_is_the_inverse():
    model = quantize_(Model(), group_size=32)
    indices = torch.arange(8)
    expected = model(indices)
    assert dequantize_(model) is model
    assert set(kinds(model).values()) == {nn.Linear, nn.Embedding}
    torch.testing.assert_close(model(indices), expected)
    assert not hasattr(model, "quantize_report")
    again = quantize_(model, group_size=32)  # two-level weights: nothing more is lost
    torch.testing.assert_close(again(indices), expected)


def test_training_mode_device_and_dtype_are_kept():
    model = quantize_(Model().eval().to(torch.bfloat16))
    assert not any(m.training for m in model.modules())
    assert model.head.scales.dtype == torch.bfloat16


def test_subclasses_are_left_alone():
    """Attention reads the weight of its out_proj itself: a swapped one would not be found."""
    model = quantize_(nn.TransformerEncoderLayer(128, 2, 256, batch_first=True))
    assert type(model.self_attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    assert type(model.linear1) is OneBitLinear
    assert torch.isfinite(model(torch.randn(2, 3, 128))).all()


def test_a_whole_model_compiles_in_one_graph():
    model = quantize_(Model())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for shape in ((2, 3), (4, 5)):
        indices = torch.randint(0, 50, shape)
        torch.testing.assert_close(compiled(indices), model(indices))


ERRORS = [
    (lambda: quantize_(nn.Linear(128, 8)), "model must contain the layers to swap, got Linear"),
    (lambda: quantize_(Model(), group_size=48), "group_size must be 32, 64 or 128, got 48"),
    (
        lambda: quantize_(Model(), filter_fn=lambda m, n: {"bits": 2}),
        r"filter_fn must return options among .* got \['bits'\]",
    ),
    (lambda: dequantize_(OneBitLinear(128, 8)), "model must contain the layers to swap"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=[row[1] for row in ERRORS])
def test_illegal_request_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("last", [{"group_size": 48}, {"method": "best"}, {"method": "calibrated"}])
def test_refused_request_changes_nothing(last):
    model = Model()
    with pytest.raises(ValueError, match=f"{next(iter(last))} must"):
        quantize_(model, filter_fn=lambda m, n: n != "head" or last)
    assert set(kinds(model).values()) == {nn.Linear, nn.Embedding}


def test_everything_public_is_exported():
    assert all(hasattr(torch_onebit, name) for name in torch_onebit.__all__)
