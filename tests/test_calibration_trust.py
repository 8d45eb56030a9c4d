"""calibrate_ on what people really give it: broken numbers, degenerate data, batches of all kinds,
errors half way. A model is changed as a whole or not at all."""

import copy
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from test_calibration_batches import PAIRS, Masked
from torch import nn
from tqdm import tqdm

from torch_onebit import CalibrationOptions, LoRALinear, OneBitLinear, calibrate_, quantize_, report
from torch_onebit.calibration.checkpoint import contents
from torch_onebit.calibration.layer import Normal
from torch_onebit.calibration.model import LOOPED, _Bar

FEW = {"group_size": 32, "progress": False, "options": CalibrationOptions(rounds=2)}


def layers(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(32, 64, bias=bias), nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 32, bias=bias)
    )


def snapshot(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[tuple[type, bool]]]:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return tensors, [(type(module), module.training) for module in model.modules()]


def assert_as_before(model: nn.Module, before) -> None:
    tensors, modules = before
    assert [(type(module), module.training) for module in model.modules()] == modules
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, tensors[name], rtol=0, atol=0, equal_nan=True, msg=name)


def with_value(shape, value: float) -> torch.Tensor:
    t = torch.randn(shape)
    t.view(-1)[5] = value
    return t


def poisoned(name: str, value: float) -> nn.Module:
    model = layers()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = value
    return model


GOOD = torch.randn(8, 32)
BROKEN = [
    (
        "NaN in a batch",
        layers,
        [GOOD, with_value((8, 32), float("nan"))],
        "batches must give every layer finite inputs, got NaN from batch 1 at layer '0'",
    ),
    (
        "Inf in a batch",
        layers,
        [with_value((8, 32), float("-inf")), GOOD],
        "batches must give every layer finite inputs, got Inf from batch 0 at layer '0'",
    ),
    (
        "values whose outputs overflow",
        layers,
        [GOOD, torch.full((4, 32), 3e38)],
        "batches must give every layer finite outputs, got .* from batch 1 at layer '0'",
    ),
    (
        "NaN in a weight",
        lambda: poisoned("3.weight", float("nan")),
        [GOOD],
        "model must have finite weights, got NaN in the weight of layer '3'",
    ),
    (
        "Inf in a bias",
        lambda: poisoned("0.bias", float("inf")),
        [GOOD],
        "model must have finite weights, got Inf in the bias of layer '0'",
    ),
    (
        "only empty batches",
        layers,
        [torch.empty(0, 32), torch.empty(0, 32)],
        "batches must hold inputs, got 2 that are all empty",
    ),
]


@pytest.mark.parametrize("why, make, batches, message", BROKEN, ids=[row[0] for row in BROKEN])
def test_what_is_not_finite_or_empty_is_named_before_anything_changes(why, make, batches, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        calibrate_(model, batches, **FEW)
    assert_as_before(model, before)


def test_empty_batches_among_others_are_nothing():
    model = layers()
    other = copy.deepcopy(model)
    calibrate_(model, [GOOD], **FEW)
    calibrate_(other, [torch.empty(0, 32), GOOD, torch.empty(0, 32)], **FEW)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


DEGENERATE = [
    ("one sample", torch.randn(1, 32)),
    ("one sample many times", torch.randn(1, 32).expand(40, 32)),
    ("a constant", torch.full((40, 32), 3.7)),
    ("zeros", torch.zeros(40, 32)),
    ("far from zero", 1e4 + torch.randn(40, 32)),
    ("fewer samples than inputs", torch.randn(3, 32)),
    ("tiny", 1e-20 * torch.randn(40, 32)),
    ("huge", 1e15 * torch.randn(40, 32)),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("why, x", DEGENERATE, ids=[row[0] for row in DEGENERATE])
def test_degenerate_data_gives_errors_with_a_meaning(why, x, lora_rank, bias):
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(32, 64, bias=bias))
        float_model = copy.deepcopy(model)
        (row,) = report(calibrate_(model, [x], lora_rank=lora_rank, **FEW)).layers
        with torch.no_grad():
            y, y_0 = model(x).double(), float_model(x).double()
        measured = float((y - y_0).square().sum() / y_0.square().sum().clamp(min=1e-300))
        assert 0 <= row.output_error < 1
        assert row.output_error == pytest.approx(measured, rel=2e-2, abs=1e-5)


def test_layers_without_columns_are_quantized_without_data():
    model = nn.Sequential(nn.Linear(32, 0), nn.Linear(0, 32), nn.Linear(32, 32))
    with torch.no_grad():
        expected = model[:2](GOOD)
    found = report(calibrate_(model, [GOOD], **FEW))
    assert [row.note for row in found.layers] == ["no weights", "no weights", ""]
    assert torch.equal(model[:2](GOOD), expected)


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_error_half_way_leaves_the_model_as_it_was(error, tmp_path, monkeypatch):
    model = layers().train()
    model[2].eval()  # frozen batch norm
    before = snapshot(model)
    saved = []

    def fail(*args):
        saved.append(args)
        if len(saved) == 2:
            raise error

    monkeypatch.setattr("torch_onebit.calibration.checkpoint.Store.save", fail)
    with pytest.raises(error):
        calibrate_(model, [GOOD], **FEW)
    assert_as_before(model, before)


def test_an_error_while_layers_are_installed_leaves_the_model_as_it_was():
    class Stubborn(nn.Sequential):
        def __setattr__(self, name, value):
            if name == "3" and isinstance(value, OneBitLinear):
                raise Stop
            super().__setattr__(name, value)

    model = Stubborn(*layers())
    before = snapshot(model)
    with pytest.raises(Stop):
        calibrate_(model, [GOOD], **FEW)
    assert_as_before(model, before)


def test_modes_parameters_and_hooks_of_the_model_are_kept():
    model = layers().train()
    model[2].eval()
    model[0].bias.requires_grad_(False)
    bias, seen = model[0].bias, []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    calibrate_(model, [GOOD], **FEW)
    assert [module.training for module in model] == [True, True, False, True]
    assert model[0].bias is bias and not bias.requires_grad
    seen.clear()
    model(GOOD)
    assert seen == [1]


def test_two_layers_with_one_bias_get_one_each():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[2].bias = model[0].bias
    float_model = copy.deepcopy(model)
    calibrate_(model, [GOOD + 1], **FEW)
    with torch.no_grad():
        for end in (1, 3):  # of both layers the mean is right
            torch.testing.assert_close(
                model[:end](GOOD + 1).mean(0),
                float_model[:end](GOOD + 1).mean(0),
                rtol=1e-4,
                atol=1e-4,
            )


def test_a_model_that_changes_its_inputs_changes_no_batch():
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, a, b):
            a += 1
            b.mul_(2)
            return self.layer(a + b)

    x, y = GOOD.clone(), GOOD.clone()
    calibrate_(Greedy(), [{"a": x, "b": y}], **FEW)
    assert torch.equal(x, GOOD) and torch.equal(y, GOOD)


def test_a_checkpoint_belongs_to_the_contents_of_batches_and_model(tmp_path):
    model = layers()
    calibrate_(copy.deepcopy(model), [GOOD], checkpoint=tmp_path, **FEW)
    calibrate_(copy.deepcopy(model), [GOOD.clone()], checkpoint=tmp_path, **FEW)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].running_mean[3] = 1
    for changed, batches in [(model, [GOOD + 1]), (other, [GOOD])]:
        with pytest.raises(ValueError, match=r"checkpoint must hold .* these batches and options"):
            calibrate_(copy.deepcopy(changed), batches, checkpoint=tmp_path, **FEW)
    (tmp_path / "00000.pt").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"checkpoint must hold files of calibrate_, got .*00000"):
        calibrate_(copy.deepcopy(model), [GOOD], checkpoint=tmp_path, **FEW)


def test_contents_are_told_apart_by_value_dtype_and_shape():
    x = torch.arange(4.0)
    values = [x, x.double(), x.view(2, 2), x + 1, [x], {"x": x}, {"y": x}, 1, 1.0, "1", None, True]
    assert len({contents(value) for value in values}) == len(values)
    assert contents([x[::2], torch.tensor(1, dtype=torch.bfloat16)]) == contents(
        [torch.tensor([0.0, 2.0]), torch.tensor(1, dtype=torch.bfloat16)]
    )
    with pytest.raises(ValueError, match=r"batches must hold tensors, .* got object"):
        contents([object()])


class Looped(nn.Module):
    """A block that runs several times on its own output, as in ALBERT: attention and MLP."""

    def __init__(self, loops: int = 4, width: int = 64) -> None:
        super().__init__()
        self.loops = loops
        self.enter = nn.Linear(32, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.leave = nn.Linear(width, 32)

    def forward(self, x):
        x = self.enter(x)
        for _ in range(self.loops):
            q, k, v = self.qkv(x).chunk(3, -1)
            x = self.norms[0](x + self.out(nn.functional.scaled_dot_product_attention(q, k, v)))
            x = self.norms[1](x + self.down(nn.functional.gelu(self.up(x))))
        return self.leave(x)


class Siamese(nn.Module):
    """One encoder, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
        self.head = nn.Linear(128, 32)

    def forward(self, x):
        both = [self.encoder(x), self.encoder(3 - 2 * x.flip(-1))]
        return self.head(torch.cat(both, -1))


@pytest.mark.parametrize("make", [Looped, Siamese])
def test_layers_called_more_than_once_are_fitted_to_all_calls(make):
    torch.manual_seed(0)
    model = make().eval()
    mixing = torch.randn(32, 32) * 0.3
    train = [torch.randn(4, 16, 32) @ mixing for _ in range(6)]
    test = torch.randn(4, 16, 32) @ mixing
    plain = quantize_(copy.deepcopy(model), group_size=32, progress=False)
    calibrated = copy.deepcopy(model)
    found = report(calibrate_(calibrated, train, group_size=32, progress=False))
    with torch.no_grad():
        error, before = (
            (other(test) - model(test)).square().mean() for other in (calibrated, plain)
        )
    assert error < 0.5 * before
    repeated = {row.name: row.note for row in found.layers if row.note}
    times = "called 2 times"
    if make is Looped:
        times = "called 4 times, in a loop: inputs of the float model"
    names = ["qkv", "out", "up", "down"] if make is Looped else ["encoder.0", "encoder.2"]
    assert repeated == dict.fromkeys(names, times)


def test_layers_in_a_loop_are_damped_more(monkeypatch):
    """Their inputs will have the errors of the loops before, which the float model has not."""
    found = []

    def spy(inputs, centred, damping):
        found.append((len(inputs.shift), damping))
        return Normal(inputs, centred, damping)

    monkeypatch.setattr("torch_onebit.calibration.model.Normal", spy)
    options = CalibrationOptions(damping=0.02)
    batches = [torch.randn(2, 8, 32)]
    calibrate_(Looped(loops=2), batches, group_size=32, options=options, progress=False)
    looped = 0.02 * LOOPED
    assert looped > 1
    inside = [(64, looped), (64, looped), (64, looped), (128, looped)]
    assert found == [(32, 0.02), *inside, (64, 0.02)]


class Routed(nn.Module):
    """The way of a row depends on its values: the 1-bit model may send it elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 32)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        left = self.gate(x)[:, 0] > 0
        y = torch.empty_like(x)
        for expert, rows in zip(self.experts, (left, ~left), strict=True):
            y[rows] = expert(x[rows])
        return y


def test_layers_whose_inputs_differ_in_number_see_those_of_the_float_model():
    torch.manual_seed(0)
    found = report(calibrate_(Routed(), [torch.randn(64, 32) for _ in range(3)], **FEW))
    elsewhere = "inputs of the float model: the 1-bit one goes elsewhere"
    assert [row.note for row in found.layers] == ["", elsewhere, elsewhere]
    assert all(0 <= row.output_error < 0.5 for row in found.layers)


@pytest.mark.parametrize("nested", [False, True])
def test_encoder_layers_of_pytorch_are_calibrated_without_its_global_switch(nested, monkeypatch):
    """Nor its nested tensors, which it makes of padded batches when no gradient is wanted."""
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2, enable_nested_tensor=nested
    ).eval()
    padding = torch.arange(6) >= torch.tensor([[6], [3], [5], [6]])
    batches = [{"src": torch.randn(4, 6, 32), "src_key_padding_mask": padding} for _ in range(3)]
    monkeypatch.setattr(torch.backends.mha, "set_fastpath_enabled", None)  # whoever calls it fails
    found = report(calibrate_(model, batches, **FEW))
    assert [row.name for row in found.layers if row.output_error is not None] == [
        f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)
    ]
    assert all(row.output_error < 0.5 for row in found.layers)
    assert model.use_nested_tensor == nested


def test_the_report_says_what_was_made_of_batches_and_how_the_model_ran():
    found = report(calibrate_(Masked(), PAIRS, **FEW))
    assert "2 batches: tuple of 2 as x, 1 more left out" in str(found)
    assert "ran the whole model for every layer: it has no list of blocks" in str(found)
    assert "use_cache=False" in str(found)
    assert "nothing" not in str(found)
    found = report(calibrate_(layers(), [GOOD], **FEW))
    assert "ran one block at a time: the whole model" in str(found)


def test_low_rank_products_stand_beside_layers_called_twice():
    model = Siamese()
    calibrate_(model, [torch.randn(16, 32)], lora_rank=2, **FEW)
    assert isinstance(model.encoder[0], LoRALinear)


def test_the_time_left_counts_layers_by_what_they_cost(monkeypatch):
    shown = {"disable": False, "file": StringIO()}  # not a terminal
    monkeypatch.setattr(
        "torch_onebit.calibration.model.tqdm", lambda **given: tqdm(**{**given, **shown})
    )
    bar = _Bar({"loaded": 50.0, "small": 1.0, "large": 9.0}, shown=True)
    jobs = {name: SimpleNamespace(name=name) for name in bar.costs}
    bar.finish(jobs["loaded"], fresh=False)  # from a checkpoint: no time, and none left for it
    bar.finish(jobs["small"], fresh=True)
    state = {**bar.bar.format_dict, "elapsed": 60.0}
    assert "10%" in tqdm.format_meter(**state)
    assert "01:00 < 09:00" in tqdm.format_meter(**state)  # a tenth took a minute
    bar.close()


class Called(nn.Module):
    """Calls its layer as some people do."""

    def __init__(self, how) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.how = how

    def forward(self, x):
        return self.how(self.layer, x)


WAYS = [
    ("by keyword", lambda layer, x: layer(input=x)),
    ("on one vector", lambda layer, x: layer(x[0])),
    ("output changed in place", lambda layer, x: layer(x).mul_(2)),
    ("input changed in place after", lambda layer, x: (layer(y := x + 1), y.zero_())[0]),
    ("nothing done with the output", lambda layer, x: (layer(x), x)[1]),
    ("in bfloat16", lambda layer, x: layer.to(torch.bfloat16)(x.to(torch.bfloat16))),
]


@pytest.mark.parametrize("why, how", WAYS, ids=[row[0] for row in WAYS])
def test_layers_are_calibrated_however_they_are_called(why, how):
    torch.manual_seed(0)
    model = Called(how)
    if "bfloat16" in why:
        model.layer.bfloat16()
    (row,) = report(calibrate_(model, [torch.randn(64, 32), torch.randn(64, 32)], **FEW)).layers
    assert row.note == "" and 0 <= row.output_error < 0.2


def test_calibration_under_autocast():
    model = layers()
    with torch.autocast("cpu", torch.bfloat16):
        found = report(calibrate_(model, [GOOD], **FEW))
    assert all(row.output_error < 0.2 for row in found.layers)
    assert model[0].scales.dtype == torch.float32
