"""Quantization-aware training: the layers, prepare_qat_, convert_."""

import copy

import pytest
import torch
import torch.nn.functional as F
from qat_models import Net, step, tokens
from torch import nn
from torch.nn.utils import parametrizations

from torch_onebit import (
    OneBitEmbedding,
    OneBitLinear,
    QATEmbedding,
    QATLinear,
    convert_,
    ops,
    prepare_qat_,
    quantize_,
    report,
)
from torch_onebit.padding import fill

METHODS = ["mean", "sign", "optimal", "minmax", "learnable"]


@pytest.mark.parametrize("method", METHODS)
def test_layer_is_linear_on_fake_quantized_weights(method):
    layer = QATLinear(nn.Linear(64, 8).double(), method=method, group_size=32)
    if method == "learnable":
        with torch.no_grad():
            layer.scales.mul_(1.3)
    x = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    if method == "learnable":
        w_hat = ops.fake_quantize_affine(layer.weight, layer.scales, layer.biases, 32)
    else:
        w_hat = ops.fake_quantize(layer.weight, method, 32)
    expected = F.linear(x, w_hat, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    inputs = (x, *layer.parameters())
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x), inputs, grad), torch.autograd.grad(expected, inputs, grad)
    )


def test_layer_takes_a_vector():
    layer = QATLinear(nn.Linear(64, 8), group_size=32)
    layer(torch.randn(64)).sum().backward()
    assert layer.weight.grad.shape == (8, 64)


def test_result_may_be_changed_in_place():
    layer, x = QATLinear(nn.Linear(64, 8), group_size=32), torch.randn(2, 3, 64)
    y = layer(x)
    y += x.sum()
    y.sum().backward()


def test_nothing_of_the_size_of_the_weight_is_kept_for_backward():
    layer = QATLinear(nn.Linear(512, 512), group_size=64)
    kept = []

    def pack(t):
        if t.data_ptr() != layer.weight.data_ptr():
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(2, 512, requires_grad=True))
    assert sum(kept) <= 2 * 512


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [False, True])
def test_converted_model_computes_what_the_trained_one_did(method, tied):
    model, x = prepare_qat_(Net(tied), method=method, group_size=32), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [step(model, optimizer, x) for _ in range(8)]
    assert losses[-1] < losses[0]
    model.eval()
    expected = model(x).detach()
    half = copy.deepcopy(model)
    convert_(model)
    assert isinstance(model.embedding, OneBitEmbedding) and isinstance(model.body, OneBitLinear)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    if tied:
        assert model.head.weight is model.embedding.weight
        assert model.head.scales is model.embedding.scales
    convert_(half, dtype=torch.float16)
    assert half.body.scales.dtype == torch.float16
    torch.testing.assert_close(half(x).float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_conversion_takes_the_bits_of_the_forward_pass(method, dtype, device):
    """Decided in float32 by both, whatever the dtype of the weights; groups of one value too."""
    layer = QATLinear(nn.Linear(256, 32, bias=False), method=method, group_size=32)
    with torch.no_grad():
        layer.weight[0] = 0.25
        layer.weight[1] *= 1e-7
        if method == "learnable":  # a step of training: levels are no longer those of the weights
            layer.scales.mul_(torch.empty_like(layer.scales).uniform_(-0.2, 1.4))
            layer.biases.mul_(torch.empty_like(layer.biases).uniform_(0.6, 1.4))
    layer.to(device, dtype)
    x = torch.eye(256, dtype=dtype, device=device)
    model = convert_(nn.Sequential(layer))
    w = model[0].dequantize()
    if dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(w, layer(x).T, rtol=1e-6, atol=1e-12)
    # A bit that differs is wrong by the whole scale; rounding of 16-bit levels, by their last bit.
    far = (w - layer(x).T).abs() > 4 * torch.finfo(dtype).eps * (w.abs() + layer(x).T.abs())
    assert not far.any()


def test_symmetric_conversion_has_no_biases():
    model, x = prepare_qat_(Net(), method="sign", group_size=32, symmetric=True), tokens()
    expected = model(x).detach()
    convert_(model)
    assert model.body.biases is None and model.embedding.symmetric
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_parameters_stay_the_same_objects():
    model = Net()
    before = dict(model.named_parameters())
    prepare_qat_(model, group_size=32)
    assert all(after is before[name] for name, after in model.named_parameters())
    assert model.state_dict().keys() == Net().state_dict().keys()


@pytest.mark.parametrize("method", ["learnable", "optimal"])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_models_train_on_from_what_they_are(method, tied):
    model, x = quantize_(Net(tied), group_size=32), tokens()
    before = model(x).detach()
    prepare_qat_(model, method=method)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert isinstance(model.body, QATLinear) and model.body.group_size == 32
    assert (model.head.weight is model.embedding.weight) == tied
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [step(model, optimizer, x) for _ in range(8)]
    assert losses[-1] < losses[0]
    expected = model(x).detach()
    torch.testing.assert_close(convert_(model)(x), expected, rtol=1e-4, atol=1e-5)


def test_the_rule_follows_from_what_a_layer_is():
    net = prepare_qat_(quantize_(Net(), group_size=32, filter_fn=lambda m, n: n == "body"))
    assert net.body.method == "learnable" and net.body.group_size == 32
    assert prepare_qat_(Net(), group_size=32).body.method == "mean"


def test_filter_chooses_layers_and_options():
    model = prepare_qat_(
        Net(),
        group_size=32,
        filter_fn=lambda m, name: {"method": "sign"} if name == "body" else name == "head",
    )
    assert type(model.embedding) is nn.Embedding
    assert model.body.method == "sign" and model.head.method == "mean"


REFUSED = [  # what the filter returns for the last layer
    ({"bits": 2}, "filter_fn must return options among"),
    ({"method": "best"}, "method must be one of"),
    ({"group_size": 48}, "group_size must be 32, 64 or 128, got 48"),
    ({"symmetric": True}, "method must be mean, .* not symmetric, for a parametrized weight"),
    ({"symmetric": True, "method": "mean"}, "method must be one of sign, learnable for symmetric"),
    ({"method": "learnable"}, "method must be mean, .* for a parametrized weight, got learnable"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=[row[1] for row in REFUSED])
def test_refused_request_changes_nothing(options, message):
    net = Net()
    parametrizations.weight_norm(net.head)
    before = dict(net.named_modules())
    with pytest.raises(ValueError, match=message):
        prepare_qat_(net, group_size=32, filter_fn=lambda m, n: n != "head" or options)
    assert dict(net.named_modules()) == before


def test_a_layer_used_twice_stays_one():
    shared = nn.Linear(64, 64)
    model = prepare_qat_(nn.Sequential(shared, nn.ReLU(), shared), group_size=32)
    assert model[0] is model[2] and isinstance(model[0], QATLinear)
    convert_(model)
    assert model[0] is model[2] and isinstance(model[0], OneBitLinear)


def test_parametrized_weights_are_quantized_after_their_parametrization():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 8)))
    prepare_qat_(model, group_size=32)
    groups = model[0].weight.unflatten(-1, (-1, 32))
    assert all(len(group.unique()) == 2 for group in groups.flatten(0, 1))
    x = torch.randn(3, 64)
    expected = model(x)
    expected.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    convert_(model)
    assert isinstance(model[0], OneBitLinear)
    torch.testing.assert_close(model(x), expected.detach(), rtol=1e-4, atol=1e-5)


PADDED = {
    "linear": (lambda: nn.Linear(100, 8), lambda: torch.randn(5, 100)),
    "embedding": (lambda: nn.Embedding(9, 100, padding_idx=0), lambda: torch.arange(9)),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Linear(100, 8)),
        lambda: torch.randn(5, 100),
    ),
}


@pytest.mark.parametrize("method", ["mean", "optimal", "learnable"])
@pytest.mark.parametrize("kind", PADDED)
def test_columns_that_no_group_divides_train_and_convert(kind, method):
    make, data = PADDED[kind]
    model = nn.Sequential(make())
    if kind == "parametrized" and method == "learnable":
        pytest.skip("parametrized weights have no levels of their own")
    before = len(list(model.parameters()))
    prepare_qat_(model, method=method, group_size=64)
    x = data()
    w = model[0].weight
    y = model(x)
    y.square().sum().backward()
    assert len(list(model.parameters())) == before + 2 * (method == "learnable")
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
    assert w.shape[-1] == 100
    convert_(model)
    torch.testing.assert_close(model(x), y.detach(), rtol=1e-4, atol=1e-5)


def test_gradients_of_filled_up_groups_are_those_of_plain_autograd():
    layer = QATLinear(nn.Linear(40, 4).double(), group_size=32)
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    w_hat = ops.fake_quantize(fill(layer.weight, 32), "mean", 32)[:, :40]
    expected, grad = F.linear(x, w_hat, layer.bias), torch.randn(3, 4, dtype=torch.float64)
    inputs = (x, *layer.parameters())
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x), inputs, grad), torch.autograd.grad(expected, inputs, grad)
    )


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_symmetric_packed_layer_stays_symmetric(kind):
    make = {"linear": nn.Linear(64, 8), "embedding": nn.Embedding(8, 64)}[kind]
    x = {"linear": torch.randn(3, 64), "embedding": torch.arange(8)}[kind]
    model = quantize_(nn.Sequential(make), group_size=32, symmetric=True)
    before = model(x)
    prepare_qat_(model)
    assert model[0].method == "learnable" and model[0].symmetric and model[0].biases is None
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    assert model[0].scales.grad.any()
    optimizer.step()
    expected = model(x).detach()
    convert_(model)
    assert model[0].symmetric and model[0].biases is None
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_symmetric_works_with_the_defaults():
    model = prepare_qat_(Net(), symmetric=True)
    assert {m.method for m in model.modules() if isinstance(m, QATLinear)} == {"sign"}


def test_an_embedding_keeps_its_kind_of_gradient():
    """Sparse gradients, and those divided by counts, as nn.Embedding has them."""
    indices, factor = torch.tensor([1, 1, 3]), torch.randn(3, 64)
    for options in ({"sparse": True}, {"scale_grad_by_freq": True}):
        plain = nn.Embedding(8, 64, **options)
        model = prepare_qat_(nn.Sequential(copy.deepcopy(plain)), group_size=32, method="sign")
        (model(indices) * factor).sum().backward()
        grad = model[0].weight.grad
        assert grad.is_sparse == plain.sparse
        once = grad.to_dense()[1]
        whole = prepare_qat_(nn.Sequential(nn.Embedding(8, 64)), group_size=32, method="sign")
        with torch.no_grad():
            whole[0].weight.copy_(plain.weight)
        (whole(indices) * factor).sum().backward()
        divided = 2 if plain.scale_grad_by_freq else 1
        torch.testing.assert_close(once * divided, whole[0].weight.grad[1])
        convert_(model)
        assert {name: getattr(model[0], name) for name in options} == options


def test_rows_keep_their_dtype_when_scales_are_half():
    model, x = prepare_qat_(nn.Sequential(nn.Embedding(9, 64)), group_size=32), torch.arange(9)
    expected = model(x).detach()
    convert_(model, dtype=torch.float16)
    assert model[0].scales.dtype == torch.float16 and model(x).dtype == torch.float32
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-3)
    assert model.half()(x).dtype == torch.float16


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: prepare_qat_(Net(), method="best"), "method must be one of .*, got best"),
        (lambda: prepare_qat_(Net(), group_size=16), "group_size must be 32, 64 or 128, got 16"),
        (
            lambda: prepare_qat_(Net(), symmetric=True, method="mean"),
            "method must be one of sign, learnable for symmetric weights, got mean",
        ),
        (lambda: prepare_qat_(nn.Linear(64, 8)), "model must contain the layers .*, got Linear"),
        (
            lambda: convert_(QATLinear(nn.Linear(64, 8), group_size=32)),
            "model must contain the layers .*, got QATLinear",
        ),
        (
            lambda: prepare_qat_(Net(), filter_fn=lambda m, name: {"bits": 1}),
            r"filter_fn must return options among .*, got \['bits'\]",
        ),
        (
            lambda: QATEmbedding(nn.Embedding(8, 64, max_norm=1.0), group_size=32),
            "embedding must have no max_norm, got 1.0",
        ),
    ],
)
def test_illegal_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_later_step_keeps_the_reasons_of_an_earlier_one():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32), nn.Embedding(4, 64))
    prepare_qat_(model, group_size=32, skip=["1", "2"])
    convert_(model)
    left = {row.name: row.reason for row in report(model).left}
    assert {left["1"], left["2"]} == {"skip has '1'", "skip has '2'"}
