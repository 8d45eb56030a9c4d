"""torch.compile and torch.export: one graph, the same numbers, no recompilation for a new M."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_weights
from torch import nn
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend

import torch_onebit
from torch_onebit import OneBitEmbedding, OneBitLinear, QATEmbedding, QATLinear

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import byte_lm

ops = torch.ops.onebit


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def inputs(requires_grad: bool = False):
    packed, scales, biases = make_weights(96, 128, group_size=32)
    return packed, scales.requires_grad_(requires_grad), biases.requires_grad_(requires_grad)


def layer(x, packed, scales, biases):
    return torch.relu(ops.qmm(x, packed, scales, biases, 32) + 1)


def test_compiled_qmm_equals_eager():
    weights = inputs()
    x = torch.randn(5, 128)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x, *weights), layer(x, *weights))


def test_one_graph_serves_every_m():
    weights = inputs()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for m in (2, 3, 17, 64, 5):
        x = torch.randn(m, 128)
        torch.testing.assert_close(compiled(x, *weights), layer(x, *weights))
    assert counter.frame_count == 1


def test_one_graph_serves_every_m_in_training():
    weights = inputs(requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for m in (2, 9, 33):
        x = torch.randn(m, 128, requires_grad=True)
        tensors = (x, *weights[1:])
        actual = torch.autograd.grad(compiled(x, *weights).sum(), tensors)
        expected = torch.autograd.grad(layer(x, *weights).sum(), tensors)
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


FUNCTIONS = {
    "quantize": lambda x, p, s, b: ops.dequantize(*ops.quantize(x, 32), 32),
    "embedding": lambda x, p, s, b: ops.embedding(torch.arange(3), p, s, b, 32) + x[:3],
    "gather_qmm": lambda x, p, s, b: ops.gather_qmm(
        x[:, None], p.view(4, 24, 4), s.view(4, 24, 4), None, None, torch.arange(6) % 4, 32
    ),
    "transpose=False": lambda x, p, s, b: ops.qmm(x[:, :96], p, s, b, 32, False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_operator_compiles_in_one_graph(name):
    x, weights = torch.randn(6, 128), inputs()
    function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *weights), function(x, *weights))


def rows(m: int) -> torch.Tensor:
    return torch.randn(m, 64)


def indices(m: int) -> torch.Tensor:
    return torch.randint(20, (m, 3))


def tokens(m: int) -> torch.Tensor:
    return torch.randint(256, (m, 16))


def demo(change) -> nn.Module:
    """The demo's model, small, made 1-bit."""
    return change(byte_lm.ByteLM(byte_lm.Config(width=64, layers=1, heads=2, context=16)))


MODELS = {
    "linear": (lambda: OneBitLinear(64, 8, group_size=32), rows),
    "linear, levels train": (lambda: OneBitLinear(64, 8, group_size=32).requires_grad_(), rows),
    "embedding": (lambda: OneBitEmbedding(20, 64, 0, group_size=32).requires_grad_(), indices),
    "lora": (
        lambda: torch_onebit.add_lora_(nn.Sequential(OneBitLinear(64, 8, group_size=32))),
        rows,
    ),
    "QAT linear": (lambda: QATLinear(nn.Linear(64, 8), group_size=32), rows),
    "QAT linear, learnable": (
        lambda: QATLinear(nn.Linear(64, 8), method="learnable", group_size=32),
        rows,
    ),
    "QAT embedding": (lambda: QATEmbedding(nn.Embedding(20, 64, 0), group_size=32), indices),
    "QAT embedding, learnable": (
        lambda: QATEmbedding(nn.Embedding(20, 64), method="learnable", group_size=32),
        indices,
    ),
    "demo": (lambda: demo(lambda m: torch_onebit.quantize_(m, group_size=32)), tokens),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "sizes, options, mark",
    [
        ((2, 3, 17), {"dynamic": True}, lambda x: None),  # 1 is a case of its own to PyTorch
        ((2, 3, 17, 1), {}, lambda x: mark_unbacked(x, 0)),
    ],
    ids=["dynamic=True", "every M, 1 too"],
)
def test_one_graph_serves_every_m_of_a_module(name, sizes, options, mark):
    make, inputs_of = MODELS[name]
    model = make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, **options)
    trains = [p for p in model.parameters() if p.requires_grad]
    graphs = []
    for m in sizes:
        x = inputs_of(m)
        expected = model(x)
        mark(x)
        y = compiled(x)
        torch.testing.assert_close(y, expected)
        if trains:
            gradients = [torch.autograd.grad(t.square().sum(), trains) for t in (y, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


def levels_and_lora(model: nn.Module) -> nn.Module:
    packed = torch_onebit.quantize_(model, group_size=32)
    return torch_onebit.add_lora_(torch_onebit.thaw_levels_(packed))


@pytest.mark.parametrize(
    "change, backend",
    [
        (lambda m: torch_onebit.prepare_qat_(m, method="learnable", group_size=32), "inductor"),
        (lambda m: torch_onebit.prepare_qat_(m, group_size=32), "aot_eager"),
        (levels_and_lora, "aot_eager"),  # Inductor would cost 20 seconds more each
    ],
    ids=["QAT learnable", "QAT", "levels and LoRA"],
)
def test_compiled_training_of_the_demo_takes_the_same_steps(change, backend):
    """Model and loss in one graph, batches of several sizes, AdamW."""
    eager = demo(change)
    compiled = copy.deepcopy(eager)
    loss_of = lambda model, x: byte_lm.cross_entropy(model(x[:, :-1]), x[:, 1:])
    step = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=backend)
    batches = [tokens(m) for m in (4, 3, 5)]
    losses = []
    for model, loss in ((eager, loss_of), (compiled, step)):
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True
        )
        for x in batches:
            value = loss(model, x)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-3)
    assert losses[2] != losses[0]


def test_export_saves_loads_and_agrees(tmp_path):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in zip(("packed", "scales", "biases"), inputs(), strict=True):
                self.register_buffer(name, value)

        def forward(self, x):
            return layer(x, self.packed, self.scales, self.biases)

    module, x = Layer(), torch.randn(4, 128)
    rows = torch.export.Dim("rows", min=1, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes={"x": {0: rows}})
    torch.export.save(exported, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for m in (4, 1, 33):
        x = torch.randn(m, 128)
        torch.testing.assert_close(loaded(x), module(x))
