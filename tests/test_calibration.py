"""Methods by name, the calibration solver, and calibrate_ on whole models."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import torch_onebit
from torch_onebit import (
    CalibrationOptions,
    OneBitEmbedding,
    OneBitLinear,
    calibrate_,
    quantize_,
    quantize_weight,
    report,
    thaw_levels_,
    thaw_lora_,
)
from torch_onebit.calibration.running import watch


def correlated(rows: int, columns: int) -> torch.Tensor:
    """Inputs that leave room for calibration: correlated, with a mean."""
    return torch.randn(rows, columns) @ torch.randn(columns, columns) * 0.2 + torch.randn(columns)


def decode(levels, group_size: int) -> torch.Tensor:
    return torch_onebit.dequantize(*levels, group_size)


def output_error(w, levels, moments, group_size: int) -> float:
    difference = (w - decode(levels, group_size)).double()
    return float(((difference @ moments.double()) * difference).sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 128])
def test_calibrated_keeps_outputs_better_than_optimal(group_size, symmetric):
    x, w = correlated(600, 256), torch.randn(70, 256)
    moments = x.t() @ x / len(x)
    plain = quantize_weight(w, "optimal", group_size, symmetric=symmetric)
    better = quantize_weight(w, "calibrated", group_size, symmetric=symmetric, moments=moments)
    assert (better[2] is None) == symmetric
    assert output_error(w, better, moments, group_size) < 0.5 * output_error(
        w, plain, moments, group_size
    )


def test_weights_are_calibrated_alike_under_autocast():
    x, w = correlated(600, 256), torch.randn(70, 256)
    moments = x.t() @ x
    plain = quantize_weight(w, "calibrated", 64, moments=moments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantize_weight(w, "calibrated", 64, moments=moments)[0], plain[0])


def test_sums_are_float64_where_the_device_has_none(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))
    batches = [correlated(50, 64) for _ in range(2)]
    there = copy.deepcopy(model).to(device)
    calibrate_(there, [x.to(device) for x in batches], group_size=32, lora_rank=2)
    assert {t.device.type for t in there.state_dict().values()} == {torch.device(device).type}
    calibrate_(model, batches, group_size=32, lora_rank=2)
    x = batches[0]
    torch.testing.assert_close(there(x.to(device)).cpu(), model(x), rtol=1e-3, atol=1e-3)


def test_calibration_with_uncorrelated_inputs_is_the_weighted_optimum_or_better():
    w, importance = torch.randn(8, 128), torch.rand(128) + 0.1
    moments = importance.diag()
    plain = quantize_weight(w, "optimal", 64, importance=importance)
    assert (
        output_error(w, quantize_weight(w, "calibrated", 64, moments=moments), moments, 64)
        <= output_error(w, plain, moments, 64) * 1.01
    )  # another local optimum at most


def test_calibration_survives_dead_inputs_and_empty_weights():
    w, moments = torch.randn(4, 64), torch.zeros(64, 64)
    assert all(
        torch.isfinite(t).all() for t in quantize_weight(w, "calibrated", 32, moments=moments)
    )
    none = quantize_weight(torch.empty(0, 64), "calibrated", 32, moments=torch.eye(64))
    assert none[1].shape == (0, 2)


@pytest.mark.parametrize("method", ["minmax", "sign", "mean", "optimal"])
def test_from_linear_and_quantize_take_a_method(method):
    linear = nn.Linear(64, 8)
    expected = quantize_weight(linear.weight, method, 32)
    layer = OneBitLinear.from_linear(linear, group_size=32, method=method)
    assert torch.equal(layer.dequantize(), decode(expected, 32))
    model = quantize_(nn.Sequential(linear), group_size=32, method=method)
    assert torch.equal(model[0].dequantize(), decode(expected, 32))


def test_optimal_is_the_default():
    linear, embedding = nn.Linear(64, 8), nn.Embedding(8, 64)
    for layer, float_layer in [
        (OneBitLinear.from_linear(linear, group_size=32), linear),
        (OneBitEmbedding.from_embedding(embedding, group_size=32), embedding),
    ]:
        expected = quantize_weight(float_layer.weight, "optimal", 32)
        assert torch.equal(layer.dequantize(), decode(expected, 32))


W = torch.randn(4, 64)
ERRORS = [
    ({"method": "best"}, "method must be one of minmax, .*, got best"),
    ({"method": "minmax", "symmetric": True}, "method must be .* symmetric weights, got minmax"),
    ({"method": "calibrated"}, "moments must be given .* got none for calibrated"),
    ({"method": "sign", "moments": torch.eye(64)}, "moments must .* got a tensor for sign"),
    ({"method": "calibrated", "moments": torch.eye(32)}, r"moments must .* got \[32, 32\]"),
    ({"method": "minmax", "importance": W}, "importance must be None for method minmax"),
]


@pytest.mark.parametrize("options, message", ERRORS, ids=[m for _, m in ERRORS])
def test_illegal_methods(options, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(W, group_size=32, **options)


class Net(nn.Module):
    """Two layers used out of order of definition, one twice, one never, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.last = nn.Linear(128, 16)
        self.unused = nn.Linear(64, 64)
        self.first = nn.Linear(64, 128)
        self.middle = nn.Linear(128, 128, bias=False)
        self.odd = nn.Linear(16, 4)

    def forward(self, tokens):
        x = torch.relu(self.first(self.embedding(tokens)))
        return self.odd(self.last(torch.relu(self.middle(x)) + x))


def net_and_batches():
    net = Net().eval()
    return net, [torch.randint(50, (8, 12)) for _ in range(6)]


@torch.no_grad()
def distance(net, other, batches) -> float:
    return float(sum((net(b) - other(b)).square().mean() for b in batches))


def test_calibrate_beats_optimal_and_reports_every_layer():
    net, batches = net_and_batches()
    plain = quantize_(copy.deepcopy(net), group_size=32)
    calibrated = copy.deepcopy(net)
    found = report(calibrate_(calibrated, batches, group_size=32, progress=False))
    assert distance(net, calibrated, batches) < 0.5 * distance(net, plain, batches)
    rows = {row.name: row for row in found.layers}
    assert {r.name for r in found.layers if not r.note} == {"first", "middle", "last", "odd"}
    assert rows["embedding"].note == "embedding"
    assert rows["unused"].note == "not reached by batches"
    assert all(0 < rows[name].output_error < 0.5 for name in ("first", "middle", "last", "odd"))
    assert "middle" in str(found) and "4" in str(found)
    assert isinstance(calibrated.middle, OneBitLinear) and calibrated.middle.bias is None


def test_reported_output_error_is_the_one_measured():
    net = nn.Sequential(nn.Linear(64, 32), nn.Identity())
    x = correlated(200, 64)
    calibrated = copy.deepcopy(net)
    found = report(calibrate_(calibrated, [x], group_size=32, progress=False))
    with torch.no_grad():
        y = net(x)
        measured = (calibrated(x) - y).square().sum() / y.square().sum()
    assert found.layers[0].output_error == pytest.approx(float(measured), rel=1e-3)


def test_calibrate_corrects_the_mean_in_the_bias():
    net = nn.Sequential(nn.Linear(64, 32))
    x = correlated(200, 64) + 5
    calibrated = copy.deepcopy(net)
    calibrate_(calibrated, [x], group_size=32, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(calibrated(x).mean(0), net(x).mean(0), rtol=1e-3, atol=1e-3)


def test_calibrate_is_deterministic_and_resumes(tmp_path):
    net, batches = net_and_batches()
    whole, cut, resumed = (copy.deepcopy(net) for _ in range(3))
    calibrate_(whole, batches, group_size=32, progress=False)

    class Cut(Exception):
        pass

    def stop_at_last(module, args, output):
        if len(list(tmp_path.glob("*.pt"))) == 4:  # embedding, unused, first, middle
            raise Cut

    cut.last.register_forward_hook(stop_at_last)
    with pytest.raises(Cut):
        calibrate_(cut, batches, group_size=32, checkpoint=tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.pt"))) == 4  # embedding, unused, first, middle
    calibrate_(resumed, batches, group_size=32, checkpoint=tmp_path, progress=False)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="checkpoint must hold layers of this model"):
        calibrate_(copy.deepcopy(net), batches, group_size=64, checkpoint=tmp_path, progress=False)


def test_calibrate_keeps_tied_weights_and_shared_layers():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(40, 64)
            self.body = nn.Linear(64, 64)
            self.again = self.body
            self.head = nn.Linear(64, 40, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.again(torch.tanh(self.body(self.embedding(tokens)))))

    model = Tied().eval()
    batches = [torch.randint(40, (4, 6))]
    calibrate_(model, batches, group_size=64, progress=False)
    assert model.body is model.again and isinstance(model.body, OneBitLinear)
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert torch.isfinite(model(batches[0])).all()


def test_calibrate_takes_options_per_layer_and_other_batches():
    net, batches = net_and_batches()
    calibrate_(
        net,
        [{"tokens": batches[0]}, (batches[1],)],
        group_size=32,
        filter_fn=lambda m, name: {"group_size": 64} if name == "first" else name == "middle",
        options=CalibrationOptions(rounds=1, sweeps=1),
        progress=False,
    )
    assert [row.name for row in report(net).layers] == ["first", "middle"]
    assert net.first.group_size == 64 and net.middle.group_size == 32


PASSES: Counter[int] = Counter()  # of blocks, of all copies


class Block(nn.Module):
    """Returns a tuple, changes its input in place, holds a chain of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        self.index = -1

    def forward(self, x, mask, cache=None):
        PASSES[self.index] += 1
        x += 0.5 * self.body(x * mask)
        return x, mask


class Chain(nn.Module):
    """Blocks in a row; `between` is what happens to a hidden state, mask and cache on the way."""

    def __init__(self, between=lambda x, mask: (x, mask, None)) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        for i, block in enumerate(self.blocks):
            block.index = i
        self.head = nn.Linear(64, 32)
        self.between = between

    def forward(self, tokens):
        x, mask = self.embedding(tokens), (tokens > 3)[..., None]
        for block in self.blocks:
            x, mask, cache = self.between(x, mask)
            x, _ = block(x, mask, cache=cache)
        return self.head(x)


CHAINS = [
    ("one tensor handed on", lambda x, mask: (x, mask, None), True),
    ("the sum of two tensors", lambda x, mask: (x + 1, mask, None), False),
    ("changed in place on the way", lambda x, mask: (x.add_(1), mask, None), False),
    ("another mask for every block", lambda x, mask: (x, mask.clone(), None), False),
    ("a mask changed in place", lambda x, mask: (x, mask.logical_not_(), None), False),
    ("a cache that may change", lambda x, mask: (x, mask, {"keys": object()}), False),
    ("equal numbers and strings", lambda x, mask: (x, mask, {"a": [1, "b", None]}), True),
]


@pytest.mark.parametrize("why, between, expected", CHAINS, ids=[row[0] for row in CHAINS])
def test_blocks_of_a_chain_run_on_their_own_and_nothing_else_changes(
    why, between, expected, monkeypatch
):
    net, batches = Chain(between).eval(), [torch.randint(50, (8, 12)) for _ in range(2)]
    from_start = copy.deepcopy(net)
    PASSES.clear()
    found = report(calibrate_(net, batches, group_size=32, progress=False))
    passes = dict(PASSES)
    assert found.calibration.chains == (
        *(["blocks"] if expected else []),
        *(f"blocks.{i}.body" for i in range(6)),
    )
    assert ("blocks" in str(found)) or not expected
    monkeypatch.setattr("torch_onebit.calibration.survey.is_chain", lambda runs: False)
    calibrate_(from_start, batches, group_size=32, progress=False)
    for name, value in from_start.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert (passes[0] == passes[4]) == expected, passes  # no more for blocks that come first


class Residual(nn.Module):
    """x + layer(x), in one of the ways people write it."""

    def __init__(self, add) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.add = add

    def forward(self, x):
        return self.add(x, self.layer(torch.tanh(x)))


ADDITIONS = [
    ("x + y", lambda x, y: x + y, True),
    ("y + x", lambda x, y: y + x, True),
    ("in place, into the output", lambda x, y: y.add_(x), True),
    ("in place, into the residual", lambda x, y: x.__iadd__(y), True),
    ("after dropout", lambda x, y: x + nn.functional.dropout(y, training=False), True),
    ("not the output itself", lambda x, y: x + 1 * y, False),
    ("a vector", lambda x, y: y + x[0, 0], False),
]


@pytest.mark.parametrize("why, add, expected", ADDITIONS, ids=[row[0] for row in ADDITIONS])
def test_errors_of_a_residual_are_made_up_for(why, add, expected):
    block, x = Residual(add).eval(), torch.randn(2, 3, 64)
    calls = []
    watch(block, {"layer": block.layer}, {"layer": 1}, ((x,), {}), lambda *seen: calls.append(seen))
    ((name, given, y, residual),) = calls
    assert name == "layer" and torch.equal(given, torch.tanh(x))
    assert torch.equal(y, block.layer(given))
    assert (residual is not None) == expected
    assert not expected or torch.equal(residual, x)
    assert torch.is_grad_enabled()


def test_calibrate_resumes_inside_a_chain(tmp_path):
    net, batches = Chain().eval(), [torch.randint(50, (8, 12)) for _ in range(2)]
    whole, resumed = copy.deepcopy(net), copy.deepcopy(net)
    calibrate_(whole, batches, group_size=32, checkpoint=tmp_path, progress=False)
    for path in sorted(tmp_path.glob("*.pt"))[7:]:
        path.unlink()
    calibrate_(resumed, batches, group_size=32, checkpoint=tmp_path, progress=False)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_calibrated_low_rank_products_lower_the_error_and_train(tmp_path):
    net, batches = net_and_batches()
    plain, better, resumed = (copy.deepcopy(net) for _ in range(3))
    before = report(calibrate_(plain, batches, group_size=32, progress=False))
    options = {"group_size": 32, "lora_rank": 4, "checkpoint": tmp_path, "progress": False}
    found = report(calibrate_(better, batches, **options))
    for old, new in zip(before.layers, found.layers, strict=True):
        assert old.output_error is None or new.output_error < 0.9 * old.output_error
    assert distance(net, better, batches) < 0.9 * distance(net, plain, batches)
    calibrate_(resumed, batches, **options)
    for name, value in better.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    thaw_lora_(thaw_levels_(better.requires_grad_(False)))
    better(batches[0]).square().sum().backward()
    trained = {name.rpartition(".")[2] for name, p in better.named_parameters() if p.requires_grad}
    assert trained == {"scales", "biases", "lora_a", "lora_b"}
    with pytest.raises(ValueError, match="lora_rank must be an integer of at least 0, got -1"):
        calibrate_(net, batches, lora_rank=-1)


@pytest.mark.parametrize("late", [False, True])
def test_calibrate_rejects_group_sizes_before_it_starts(late):
    net, batches = net_and_batches()
    options = {"filter_fn": lambda m, n: n != "last" or {"group_size": 16}} if late else {}
    with pytest.raises(ValueError, match="group_size must be 32, 64 or 128, got 16"):
        calibrate_(net, batches, group_size=32 if late else 16, progress=False, **options)
    assert not any(isinstance(m, OneBitLinear | OneBitEmbedding) for m in net.modules())


def test_calibrate_rejects_no_batches():
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        calibrate_(Net(), [])
