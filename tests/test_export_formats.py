"""Models with 1-bit layers as ONNX and as TorchScript."""

import copy

import pytest
import torch
from torch import nn

import torch_onebit


class Net(nn.Module):
    """Layers of every form: with and without biases, bias, padding, float16 levels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64, padding_idx=0)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        torch_onebit.quantize_(self, group_size=32)
        self.down = torch_onebit.OneBitLinear(
            128, 64, bias=False, group_size=64, symmetric=True, dtype=torch.float16
        )

    def forward(self, indices):
        h = self.embed(indices)
        return h + self.down(torch.relu(self.up(h)))


@pytest.fixture
def net():
    return Net().eval()


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_onnx_of_standard_operators_agrees(net, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "net.onnx")
    torch.onnx.export(
        net,
        (torch.randint(0, 40, (3, 5)),),
        path,
        dynamo=True,
        dynamic_shapes={"indices": {0: torch.export.Dim("batch")}},
        custom_translation_table=torch_onebit.onnx_translations(),
        optimize=False,  # folding constants would decode small weights in the file
        external_data=False,
        verbose=False,
    )
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    words = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT32]
    assert sorted(list(t.dims) for t in words if len(t.dims) == 2) == [[40, 2], [64, 4], [128, 2]]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in (3, 7):
        indices = torch.randint(0, 40, (rows, 5))
        (y,) = session.run(None, {session.get_inputs()[0].name: indices.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), net(indices), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_a_traced_module_saves_loads_and_agrees(net, tmp_path):
    with torch.no_grad():
        torch.jit.trace(net, (torch.randint(0, 40, (3, 5)),)).save(tmp_path / "net.pt")
    loaded = torch.jit.load(tmp_path / "net.pt")
    indices = torch.randint(0, 40, (6, 5))
    assert torch.equal(loaded(indices), net(indices))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["packed", "prepared"])
def test_torch_jit_script_is_refused_clearly(net, kind):
    model = net if kind == "packed" else torch_onebit.prepare_qat_(copy.deepcopy(net))
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script must be given modules"):
        torch.jit.script(model)
