"""The ways people train QAT layers: compiled, autocast, sharded, under torch.func."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from qat_models import Net, step, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_onebit import (
    QATEmbedding,
    QATLinear,
    ops,
    prepare_qat_,
)


def test_compiled_training_step_has_one_graph_and_the_same_gradients():
    model, x = prepare_qat_(Net(), group_size=32), tokens()

    def gradients(forward):
        forward(x).square().sum().backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found

    expected = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), expected, rtol=1e-4, atol=1e-5)


def test_autocast_trains_float32_weights_in_bfloat16():
    model, x = prepare_qat_(Net(), group_size=32), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    exact = copy.deepcopy(model)
    exact.zero_grad()
    exact(x).square().sum().backward()
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() < 0.05 * q.grad.norm() + 1e-6


def test_autocast_leaves_float64_as_it_leaves_it_to_linear_layers():
    layer = QATLinear(nn.Linear(64, 8).double(), group_size=32)
    x = torch.randn(2, 64, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            layer(x), F.linear(x, ops.fake_quantize(layer.weight, "mean", 32), layer.bias)
        )


def test_checkpointed_activations_give_the_same_gradients():
    model, x = prepare_qat_(Net(), group_size=32), tokens()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_gradients_accumulate_over_micro_batches():
    model, x = prepare_qat_(Net(), group_size=32), tokens()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part in x.split(1):
        model(part).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
def test_fused_and_foreach_optimizers_train(options):
    model, x = prepare_qat_(Net(), group_size=32), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    losses = [step(model, optimizer, x) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_changing_weights_between_forward_and_backward_is_refused():
    layer = QATLinear(nn.Linear(64, 8), group_size=32)
    y = layer(torch.randn(2, 64)).sum()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def functional(kind: str, method: str):
    """(a loss of the parameters and an input, the parameters, an input) of one QAT layer."""
    if kind == "linear":
        layer, x = QATLinear(nn.Linear(64, 8), method=method, group_size=32), torch.randn(3, 64)
    else:
        layer, x = QATEmbedding(nn.Embedding(9, 64), method=method, group_size=32), torch.arange(3)
    loss = lambda p, x: torch.func.functional_call(layer, p, (x,)).square().sum()
    return loss, dict(layer.named_parameters()), x


@pytest.mark.parametrize("method", ["mean", "learnable"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_functional_transforms_go_through_the_layers(kind, method):
    loss, parameters, x = functional(kind, method)
    loss(parameters, x).backward()
    expected = {name: p.grad for name, p in parameters.items()}
    torch.testing.assert_close(torch.func.grad(loss)(parameters, x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a loop would announce itself
        each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x.unsqueeze(1))
    for name, gradients in each.items():
        torch.testing.assert_close(gradients.sum(0), expected[name])


REFUSED = {
    ("linear", "mean"): ("implement the jvp", "once_differentiable"),
    ("linear", "learnable"): ("implement the jvp", "once_differentiable"),
    ("embedding", "mean"): (
        "onebit::fake_quantize must .* reverse mode",
        "onebit::fake_quantize_backward",
    ),
    ("embedding", "learnable"): (
        "onebit::fake_quantize_affine must .* reverse mode",
        "onebit::fake_quantize_affine_backward",
    ),
}


@pytest.mark.parametrize("kind, method", REFUSED)
def test_forward_mode_and_second_derivatives_are_refused(kind, method):
    forward, second = REFUSED[kind, method]
    loss, parameters, x = functional(kind, method)
    call = lambda p: loss(p, x)
    detached = {name: p.detach() for name, p in parameters.items()}
    with pytest.raises(NotImplementedError, match=forward):
        torch.func.jvp(call, (detached,), (detached,))
    leaves = list(parameters.values())
    first = torch.autograd.grad(call(parameters), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=second):
        sum(g.square().sum() for g in first).backward()


def test_fully_sharded_training_matches(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model, x = prepare_qat_(Net(), group_size=32), tokens()
    plain = copy.deepcopy(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        fully_shard(model.body, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for m in (model, plain):
            optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
            for _ in range(3):
                step(m, optimizer, x)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q)
    finally:
        dist.destroy_process_group()
