"""Prepacked weights: the same products, never stale, never in a state_dict."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torch_onebit
from torch_onebit import OneBitEmbedding, OneBitLinear

needs_prepack = pytest.mark.skipif(
    not torch.ops.onebit.can_prepack(), reason="the kernels of this machine have no such form"
)
pytestmark = needs_prepack

# rows, n, k, group, dtype of x, of scales, symmetric, and why
PRODUCTS = [
    (1, 64, 128, 128, torch.float32, torch.float16, False, "one tile, one group"),
    (2, 300, 4096, 128, torch.float32, torch.float32, False, "last tile incomplete"),
    (3, 65, 160, 32, torch.bfloat16, torch.bfloat16, True, "k of 5 words, below the int16 tables"),
    (4, 4200, 320, 64, torch.bfloat16, torch.float16, False, "two panels, int16 tables"),
    (1, 1, 2176, 64, torch.float16, torch.float16, True, "one output"),
    (4, 128, 1120, 32, torch.float32, torch.bfloat16, False, "k not a multiple of 128"),
    (5, 64, 256, 128, torch.float32, torch.float32, False, "too many rows: the weights themselves"),
    (2, 64, 128, 128, torch.float64, torch.float32, False, "float64 x: the weights themselves"),
]


def weights(n: int, k: int, group: int, dtype: torch.dtype, symmetric: bool):
    packed, scales, biases = torch_onebit.quantize(torch.randn(n, k), group)
    return packed, scales.to(dtype), None if symmetric else biases.to(dtype), group


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda c: c[-1])
def test_prepacked_product_is_qmm(case):
    rows, n, k, group, dtype, level_dtype, symmetric, _ = case
    torch.manual_seed(0)
    *levels, group = weights(n, k, group, level_dtype, symmetric)
    x = torch.randn(rows, k).to(dtype)
    prepacked = torch.ops.onebit.prepack(*levels, group)
    y = torch.ops.onebit.qmm_prepacked(x, *levels, prepacked, group)
    expected = torch_onebit.qmm(x.double(), *levels, group)
    allowed = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}.get(dtype, 1e-12)
    assert y.dtype == dtype and y.shape == (rows, n)
    assert (y.double() - expected).norm() <= allowed * expected.norm()


def test_empty_products():
    packed, scales, biases, group = weights(0, 128, 128, torch.float32, False)
    prepacked = torch.ops.onebit.prepack(packed, scales, biases, group)
    y = torch.ops.onebit.qmm_prepacked(
        torch.randn(2, 128), packed, scales, biases, prepacked, group
    )
    assert y.shape == (2, 0)


REFUSED = [
    (lambda w, p: (w, p[:-1]), "a copy cut short"),
    (lambda w, p: (w, p.clone().fill_(0)), "bytes that prepack did not make"),
    (lambda w, p: ((~w[0], *w[1:]), p), "other words"),
    (lambda w, p: ((w[0], w[1].mul_(2), w[2]), p), "scales changed in place"),
    (lambda w, p: ((w[0], w[1], None), p), "biases left out"),
    (lambda w, p: (w, p.int()), "not bytes"),
    (lambda w, p: (w, p[None]), "not a vector"),
    (lambda w, p: (w, p.new_empty(2 * p.numel())[::2]), "not contiguous"),
]


@pytest.mark.parametrize("change", REFUSED, ids=lambda c: c[1])
def test_a_copy_of_other_weights_is_refused(change):
    *levels, group = weights(64, 128, 128, torch.float32, False)
    prepacked = torch.ops.onebit.prepack(*levels, group)
    levels, prepacked = change[0](tuple(levels), prepacked)
    with pytest.raises(ValueError, match="prepacked must be"):
        torch.ops.onebit.qmm_prepacked(torch.randn(1, 128), *levels, prepacked, group)


@pytest.mark.parametrize("op", ["prepack", "qmm_prepacked", "linear"])
def test_opcheck(op):
    *levels, group = weights(64, 128, 128, torch.float32, False)
    prepacked = torch.ops.onebit.prepack(*levels, group)
    x, bias = torch.randn(2, 128, requires_grad=True), torch.randn(64, requires_grad=True)
    arguments = {
        "prepack": (*levels, group),
        "qmm_prepacked": (x.detach(), *levels, prepacked, group),
        "linear": (x, *levels, bias, None, group),
    }[op]
    torch.library.opcheck(getattr(torch.ops.onebit, op).default, arguments)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = OneBitEmbedding(10, 128)
        self.up, self.down = OneBitLinear(128, 256), OneBitLinear(256, 128, bias=False)

    def forward(self, indices):
        return self.embedding.as_linear(self.down(self.up(self.embedding(indices))))


INDICES = torch.tensor([[3], [4]])


def test_model_keeps_outputs_and_state_and_reports_bytes():
    model = Model()
    before, keys = model(INDICES), list(model.state_dict())
    assert torch_onebit.prepack_(model) is model
    found = torch_onebit.report(model)
    assert [row.name for row in found.layers] == ["up", "down"]
    copies = sum(m._prepacked.numel() for m in (model.up, model.down))
    assert found.bytes_after - found.bytes_before == copies
    assert torch.equal(model(INDICES), before) and list(model.state_dict()) == keys
    torch_onebit.prepack_(model, filter_fn=lambda module, name: name == "embedding")
    assert [row.name for row in torch_onebit.report(model).layers] == ["up", "down", "embedding"]
    torch.testing.assert_close(model(INDICES), before)


DROPS = {
    "moved": lambda m: m.to("meta"),
    "converted": lambda m: m.half(),
    "copied": copy.deepcopy,
    "pickled": lambda m: pickle.loads(pickle.dumps(m)),
    "loaded into": lambda m: m.load_state_dict(m.state_dict()) and m,
}


@pytest.mark.parametrize("what", DROPS)
def test_copy_is_dropped_when_the_layer_is(what):
    layer = OneBitLinear(128, 64)
    layer.prepack()
    assert DROPS[what](layer)._prepacked is None


def test_training_goes_through_the_weights():
    layer = OneBitLinear(128, 64).requires_grad_()
    layer.prepack()
    layer(torch.randn(2, 128)).sum().backward()
    assert layer.scales.grad is not None
    with torch.no_grad():
        layer.scales += 1
        with pytest.raises(ValueError, match="prepack again"):
            layer(torch.randn(2, 128))


def test_compiles_to_one_graph_and_exports_without_the_copy():
    layer = OneBitLinear(128, 256).requires_grad_(False)
    layer.prepack()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (1, 3, 4, 5, 9):
        x = torch.randn(rows, 128)
        torch.testing.assert_close(compiled(x), layer(x))
    exported = torch.export.export(layer, (torch.randn(2, 128),))
    assert not any(t.dtype == torch.uint8 for t in exported.constants.values())
    x = torch.randn(2, 128)
    torch.testing.assert_close(exported.module()(x), layer(x))


def test_says_what_it_left_alone():
    model = nn.Sequential(
        OneBitLinear(128, 64, dtype=torch.float64), OneBitLinear(128, 64).to("meta")
    )
    with pytest.warns(UserWarning, match="prepack_ swapped nothing"):
        torch_onebit.prepack_(model)
    found = torch_onebit.report(model)
    assert not found.layers and [row.reason for row in found.left if row.kind] == [
        "float64 levels",
        "on meta; prepacked weights serve the cpu",
    ]


def test_warns_where_kernels_have_no_such_form():
    isa = torch.ops.onebit.cpu_isa()
    torch.ops.onebit.set_cpu_isa("scalar")
    try:
        with pytest.warns(UserWarning, match="the scalar kernels have no prepacked form"):
            torch_onebit.prepack_(nn.Sequential(OneBitLinear(128, 64)))
        with pytest.raises(NotImplementedError, match="onebit::prepack"):
            OneBitLinear(128, 64).prepack()
    finally:
        torch.ops.onebit.set_cpu_isa(isa)
