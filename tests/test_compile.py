"""torch.compile and torch.export: one graph, the same numbers, no recompilation for a new M."""

import pytest
import torch
from helpers import make_weights
from torch._dynamo.testing import CompileCounterWithBackend

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
