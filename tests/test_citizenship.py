"""OneBitLinear inside the rest of PyTorch: transforms, tracing, export, profiling, subclasses."""

import copy
import warnings

import pytest
import torch
from helpers import make_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

from torch_onebit import (
    OneBitEmbedding,
    OneBitLinear,
    add_lora_,
    convert_,
    prepare_qat_,
    quantize_,
    thaw_levels_,
)

ops = torch.ops.onebit


class Net(nn.Module):
    """An embedding, two layers and a head, all 1-bit after quantize_."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64, padding_idx=0)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)
        self.head = nn.Linear(64, 40, bias=False)

    def forward(self, indices):
        h = self.embed(indices)
        h = h + self.down(torch.relu(self.up(h)))
        return self.head(h)


@pytest.fixture
def net():
    return quantize_(Net(), group_size=64).requires_grad_()


@pytest.fixture
def indices():
    return torch.randint(0, 40, (3, 5))


def test_functional_call_and_grad(net, indices):
    state = dict(net.named_parameters())
    loss = lambda p: torch.func.functional_call(net, p, (indices,)).square().mean()
    actual = torch.func.grad(loss)(state)
    loss(state).backward()
    for name, parameter in state.items():
        torch.testing.assert_close(actual[name], parameter.grad)


def test_vmap_over_an_ensemble_of_modules():
    nets = [OneBitLinear(64, 8, group_size=32) for _ in range(3)]
    x = torch.randn(5, 64)
    parameters, buffers = torch.func.stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")
    call = lambda p, b, x: torch.func.functional_call(base, (p, b), (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = torch.vmap(call, (0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(y, torch.stack([n(x) for n in nets]))


def test_training_step_compiles_to_one_graph_each_way(net, indices):
    torch._dynamo.reset()
    step = lambda model: nn.functional.cross_entropy(
        model(indices).flatten(0, 1), indices.flatten()
    )
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(net).backward()
    actual = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    step(net).backward()
    for got, parameter in zip(actual, net.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


def test_fx_traces_the_module(net, indices):
    traced = torch.fx.symbolic_trace(net)
    assert torch.equal(traced(indices), net(indices))
    names = [node.name for node in traced.graph.nodes]
    assert [name for name in names if name.startswith(("linear", "embedding"))] == [
        "embedding",
        "linear",
        "linear_1",
        "linear_2",
    ]


def test_make_fx_records_the_operators(net, indices):
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    call = lambda state, indices: torch.func.functional_call(net, state, (indices,))
    graph = torch.fx.experimental.proxy_tensor.make_fx(call, tracing_mode="fake")(state, indices)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("onebit.qmm.default") == 3
    assert targets.count("onebit.embedding.default") == 1


def test_profiler_shows_operator_names(net, indices):
    with torch.profiler.profile() as profile:
        net(indices).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"onebit::qmm", "onebit::embedding", "onebit::affine_grad"} <= names


def test_tensor_subclasses_see_the_operators():
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    weights = make_weights(8, 64, group_size=64)
    y = ops.qmm(torch.randn(2, 64).as_subclass(Watched), *weights, 64)
    assert type(y) is Watched
    assert any("onebit" in name for name in seen)


def test_fake_tensors_have_the_shape_of_real_ones(net, indices):
    expected = net(indices)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = net(torch.empty(3, 5, dtype=torch.int64))
    assert fake.shape == expected.shape
    assert fake.dtype == expected.dtype


def test_inference_mode_and_no_grad(net, indices):
    expected = net(indices)
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            y = net(indices)
        assert not y.requires_grad
        assert torch.equal(y, expected)
    assert expected.requires_grad


def test_deterministic_mode_repeats_itself(net, indices):
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            net.zero_grad()
            net(indices).square().sum().backward()
            runs.append([p.grad.clone() for p in net.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_hooks_fire(net, indices):
    fired = []
    net.up.register_forward_pre_hook(lambda m, args: fired.append("before"))
    net.up.register_forward_hook(lambda m, args, y: fired.append("after"))
    net.up.register_full_backward_hook(lambda m, gi, go: fired.append("backward"))
    net(indices).sum().backward()
    assert fired == ["before", "after", "backward"]


def test_scales_can_be_parametrized(net, indices):
    class Positive(nn.Module):
        def forward(self, scales):
            return nn.functional.softplus(scales)

    parametrize.register_parametrization(net.up, "scales", Positive())
    net(indices).sum().backward()
    assert net.up.parametrizations.scales.original.grad is not None
    assert (net.up.scales > 0).all()


@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastMPS", "AutocastCUDA", "AutocastXPU"])
@pytest.mark.parametrize("op", ["qmm", "gather_qmm"])
def test_autocast_has_a_rule_for_every_device(op, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"onebit::{op}", key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_decides_the_dtype_of_products(device, dtype):
    layer = OneBitLinear(64, 8, group_size=64, device=device)
    with torch.autocast(device, dtype):
        assert layer(torch.randn(2, 64, device=device)).dtype == dtype
        with torch.autocast(device, enabled=False):
            assert layer(torch.randn(2, 64, device=device)).dtype == torch.float32


def test_meta_device_init_then_to_empty(indices):
    with torch.device("meta"):
        net = nn.Sequential(
            OneBitEmbedding(40, 64, group_size=64), OneBitLinear(64, 8, group_size=64)
        )
    assert net(indices.to("meta")).shape == (3, 5, 8)
    net.to_empty(device="cpu")
    for module in net:
        module.reset_parameters()
    assert torch.isfinite(net(indices)).all()


def trained(**options) -> nn.Module:
    """QAT, converted: what training hands to deployment."""
    model = prepare_qat_(Net(), group_size=64, **options)
    model(torch.randint(0, 40, (3, 5))).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    return convert_(model)


EXPORTED = {
    "quantized": lambda: quantize_(Net(), group_size=64),
    "levels train": lambda: thaw_levels_(quantize_(Net(), group_size=64)),
    "trained": lambda: trained(),
    "trained, learnable": lambda: trained(method="learnable"),
    "trained, symmetric": lambda: trained(method="sign", symmetric=True),
    "LoRA": lambda: add_lora_(quantize_(Net(), group_size=64)),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_model_saves_loads_and_agrees(name, indices, tmp_path):
    net = EXPORTED[name]()
    batch = torch.export.Dim("batch", min=1, max=32)
    exported = torch.export.export(net, (indices,), dynamic_shapes={"indices": {0: batch}})
    torch.export.save(exported, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for rows in (3, 1, 9):
        indices = torch.randint(0, 40, (rows, 5))
        torch.testing.assert_close(loaded(indices), net(indices))
