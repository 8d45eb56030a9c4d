"""PrepackedLinear: weights held once, never stale."""

import copy
import io
import pickle
import threading

import pytest
import torch
from prepacked_layers import X, make_layer, needs_kernel, prepacked_layer, shown
from torch import nn
from torch.nn.utils import prune

import torch_onebit
from torch_onebit import OneBitLinear, PrepackedLinear, tie


@needs_kernel
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_holds_its_weights_once_and_shows_them_all_the_same(symmetric, dtype):
    layer = make_layer(symmetric=symmetric, dtype=dtype)
    state, dense, y = copy.deepcopy(layer.state_dict()), layer.dequantize(), layer(X)
    size = layer.prepack()
    assert [(n, b.numel()) for n, b in layer.named_buffers()] == [("prepacked", size)]
    assert list(layer.parameters()) == [layer.bias]
    torch.testing.assert_close(layer(X), y)
    assert torch.equal(layer.dequantize(), dense)
    assert list(layer.state_dict()) == list(state)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert isinstance(layer, PrepackedLinear)  # none of this changed it
    back = layer.unprepack()
    assert back is layer and type(layer) is OneBitLinear
    assert vars(layer).keys() == vars(make_layer()).keys()
    assert list(layer.state_dict()) == list(state) and torch.equal(layer.weight, state["weight"])
    assert not layer.scales.requires_grad


def other_state() -> dict:
    torch.manual_seed(1)
    return make_layer().state_dict()


def edit_row(layer):
    with torch.no_grad():
        layer.scales[7] += 1


def edit_in_inference_mode(layer):
    with torch.inference_mode():
        layer.weight[3] = ~layer.weight[3]


def assign(name, make):
    def change(layer):
        setattr(layer, name, make(getattr(layer, name)))

    return change


def functional(layer):
    weights = {"weight": ~layer.state_dict()["weight"]}
    y = torch.func.functional_call(layer, weights, (X,))
    other = make_layer()
    other.load_state_dict({**layer.state_dict(), **weights})
    torch.testing.assert_close(y, shown(other))


def buffers_of_another(layer):
    buffers = dict(prepacked_layer().named_buffers())
    y = torch.func.functional_call(layer, buffers, (X,))
    torch.testing.assert_close(layer(X), shown(layer))
    assert not torch.allclose(y, shown(layer))


# Everything public that changes what a layer holds, or might.
CHANGES = {
    "weight assigned": assign("weight", torch.bitwise_not),
    "scales assigned": assign("scales", lambda s: nn.Parameter(s.detach() * 2)),
    "biases assigned": assign("biases", lambda s: nn.Parameter(s.detach() - 1)),
    "bias assigned": assign("bias", lambda b: nn.Parameter(b.detach() - 1)),
    ".data written": lambda m: m.scales.data.mul_(3),
    "NumPy written": lambda m: m.weight.numpy().__setitem__(0, 0),
    "one row edited": edit_row,
    "edited in inference mode": edit_in_inference_mode,
    "bytes written": lambda m: m.prepacked[64:].bitwise_not_(),
    "bytes assigned": lambda m: setattr(m, "prepacked", prepacked_layer().prepacked),
    "loaded": lambda m: m.load_state_dict(other_state()),
    "loaded by assignment": lambda m: m.load_state_dict(other_state(), assign=True),
    "loaded, in part": lambda m: m.load_state_dict({"bias": torch.ones(70)}, strict=False),
    "converted": lambda m: m.bfloat16().float(),
    "reset": lambda m: m.reset_parameters(),
    "moved": lambda m: m.to("meta").to_empty(device="cpu").load_state_dict(other_state()),
    "moved to where it is": lambda m: m.to("cpu"),
    "trained": lambda m: m.train(),
    "thawed": lambda m: m.scales.requires_grad_(),
    "tied": lambda m: tie(make_layer(), m),
    "symmetric": lambda m: m.drop_biases_(),
    "without biases": lambda m: setattr(m, "biases", None),
    "called functionally": functional,
    "called with the buffers of another": buffers_of_another,
    "bias pruned": lambda m: prune.random_unstructured(m, "bias", 0.5),
    "bias parametrized": lambda m: nn.utils.parametrize.register_parametrization(
        m, "bias", nn.Softplus()
    ),
    "shown, and nothing else": lambda m: (repr(m), m.dequantize(), m.state_dict(), m.to_linear()),
}


@needs_kernel
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_computes_with_the_weights_it_shows(change, compiled):
    layer = prepacked_layer()
    call = torch.compile(layer, fullgraph=True, backend="eager") if compiled else layer
    torch.testing.assert_close(call(X), shown(layer))
    with torch.no_grad():
        CHANGES[change](layer)
    torch.testing.assert_close(call(X), shown(layer))
    layer.weight  # noqa: B018  (as it is once the weights are there)
    torch.testing.assert_close(call(X), shown(layer))
    if type(layer) is OneBitLinear and layer._tie is None:
        layer.requires_grad_(False).prepack()
        torch.testing.assert_close(call(X), shown(layer))


@needs_kernel
def test_a_tensor_taken_out_before_is_not_the_layers_any_more():
    layer = make_layer()
    words = layer.weight
    layer.prepack()
    before = layer(X)
    words.zero_()
    assert torch.equal(layer(X), before)
    torch.testing.assert_close(before, shown(layer))


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# how to copy a layer: what the copy is
COPIES = {
    "deepcopy": (copy.deepcopy, PrepackedLinear),
    "copy": (copy.copy, OneBitLinear),
    "pickle": (lambda m: pickle.loads(pickle.dumps(m)), OneBitLinear),
    "torch.save": (saved, OneBitLinear),
    "state_dict": (lambda m: [n := make_layer(), n.load_state_dict(m.state_dict())][0], None),
}


@needs_kernel
@pytest.mark.parametrize("how", COPIES)
def test_copies_have_the_weights_and_files_no_layout(how):
    copied, kind = COPIES[how]
    layer = prepacked_layer()
    other = copied(layer)
    assert type(other) is (kind or OneBitLinear) and type(layer) is PrepackedLinear
    torch.testing.assert_close(other(X), layer(X))
    other.scales.data.zero_()
    torch.testing.assert_close(layer(X), shown(layer))
    assert layer.dequantize().any() and torch.equal(other.scales, torch.zeros_like(other.scales))


@needs_kernel
def test_functional_calls_with_other_levels_want_a_parameter_or_the_layer_unpacked():
    levels = {"scales": torch.ones(70, 2)}
    with pytest.raises(TypeError, match="as parameter 'scales'"):
        torch.func.functional_call(layer := prepacked_layer(), levels, (X,))
    torch.testing.assert_close(layer(X), shown(layer))
    parameters = {"scales": nn.Parameter(levels["scales"])}
    for layer, given in ((prepacked_layer(), parameters), (prepacked_layer().unprepack(), levels)):
        y = torch.func.functional_call(layer, given, (X,))
        torch.testing.assert_close(layer(X), shown(layer))
        assert not torch.allclose(y, layer(X))


@needs_kernel
def test_a_copy_that_shares_tensors_keeps_them_when_the_layer_is_prepacked():
    layer = make_layer()
    twin = copy.copy(layer)
    layer.prepack()
    torch.testing.assert_close(twin(X), layer(X))
    assert list(twin.state_dict()) == list(layer.state_dict())


@needs_kernel
def test_a_move_to_where_it_is_leaves_the_layer_prepacked():
    layer = prepacked_layer()
    for move in (lambda m: m.to("cpu", torch.float32), lambda m: m.float(), lambda m: m.eval()):
        assert type(move(layer)) is PrepackedLinear
    assert layer.share_memory().prepacked.is_shared()
    assert type(layer.half()) is OneBitLinear and layer.scales.dtype == torch.float16


@needs_kernel
def test_weights_unpacked_in_inference_mode_can_be_used_outside():
    layer = make_layer()
    with torch.inference_mode():
        layer.prepack()
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    with torch.inference_mode():
        assert not layer.scales.is_inference()
    layer.scales.requires_grad_()
    layer(x).sum().backward()
    assert layer.scales.grad is not None


@needs_kernel
def test_compiles_to_one_graph_for_all_batch_sizes():
    layer = prepacked_layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (1, 3, 4, 5, 9):
        x = torch.randn(rows, 256)
        torch.testing.assert_close(compiled(x), layer(x))
    assert isinstance(layer, PrepackedLinear)


@needs_kernel
def test_exports_and_the_program_runs_from_a_file():
    layer, x = prepacked_layer(), torch.randn(2, 256)
    rows = {"x": {0: torch.export.Dim("rows", min=1, max=512)}}
    program = torch.export.export(layer, (x,), dynamic_shapes=rows)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for x in (torch.randn(1, 256), torch.randn(7, 256)):
        torch.testing.assert_close(loaded(x), layer(x))
    assert isinstance(layer, PrepackedLinear)


@needs_kernel
def test_a_graph_that_reads_weights_says_so_or_breaks():
    layer = prepacked_layer()
    expected = layer(X)

    def call(x):
        return layer(x.to(layer.scales.dtype))

    with pytest.raises(RuntimeError, match="reading weights of a PrepackedLinear changes"):
        torch.compile(call, fullgraph=True, backend="eager")(X)
    torch.testing.assert_close(torch.compile(call, backend="eager")(X), expected)


@needs_kernel
def test_onnx_wants_the_layer_unpacked():
    pytest.importorskip("onnxscript")
    table = torch_onebit.onnx_translations()
    options = {"dynamo": True, "optimize": False, "verbose": False}
    with pytest.raises(Exception, match=r"call unprepack_\(model\) first"):
        torch.onnx.export(prepacked_layer(), (X,), custom_translation_table=table, **options)


@needs_kernel
def test_gradient_of_x_goes_through_and_levels_train_only_once_thawed():
    layer, x = prepacked_layer(), X.clone().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, -1))
    assert type(layer) is PrepackedLinear
    torch_onebit.thaw_levels_(layer, False)
    assert type(layer) is PrepackedLinear
    torch_onebit.thaw_levels_(layer)
    layer(X).sum().backward()
    assert layer.scales.grad is not None and type(layer) is OneBitLinear


@needs_kernel
def test_columns_that_fill_no_group_and_nested_rows():
    layer = OneBitLinear(200, 70).eval()
    x = torch.randn(5, 200)
    expected, dense = layer(x), layer.dequantize()
    layer.prepack()
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer.dequantize(), dense)
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([x[:2], x[2:]], layout=layout)
        for y, part in zip(layer(nested).unbind(), (expected[:2], expected[2:]), strict=True):
            torch.testing.assert_close(y, part)
    assert torch_onebit.count_parameters(layer).packed == 200 * 70


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_product_its_dtype(dtype):
    layer = prepacked_layer()
    with torch.autocast("cpu", dtype):
        y = layer(X)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), shown(layer), rtol=2e-2, atol=2e-2)


@needs_kernel
def test_readers_in_threads_and_calls_agree():
    layer = prepacked_layer()
    expected, wrong = layer(X), []

    def call():
        for _ in range(300):
            if not torch.allclose(layer(X), expected):
                wrong.append(type(layer))

    def read():
        for _ in range(100):
            layer.weight  # noqa: B018
            layer.state_dict()
            if type(layer) is OneBitLinear:
                break

    threads = [threading.Thread(target=f) for f in (call, read, read, call)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


CANNOT = {
    "tied": (lambda: [m := make_layer(), tie(m, make_layer())][0], ValueError, "a tied one"),
    "trains": (lambda: make_layer().requires_grad_(), ValueError, "must not require grad"),
    "float64": (lambda: make_layer(dtype=torch.float64), ValueError, "at most 32 bits"),
    "on meta": (lambda: make_layer().to("meta"), NotImplementedError, "got meta"),
    "a forward of its own": (
        lambda: [m := make_layer(), setattr(m, "forward", m.forward)][0],
        TypeError,
        "got another in its place",
    ),
    "a subclass": (
        lambda: type("Mine", (OneBitLinear,), {})(128, 64),
        TypeError,
        "an OneBitLinear itself, got Mine",
    ),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_cannot_be_prepacked(what):
    make, error, message = CANNOT[what]
    layer = make()
    kind = type(layer)
    with pytest.raises(error, match=message):
        layer.prepack()
    assert type(layer) is kind


def test_a_prepacked_layer_is_made_of_one_that_is_not():
    with pytest.raises(TypeError, match=r"made by OneBitLinear\.prepack"):
        PrepackedLinear(128, 64)
    with pytest.raises(TypeError, match=r"made by OneBitLinear\.prepack"):
        PrepackedLinear.from_linear(nn.Linear(128, 64))


@needs_kernel
def test_flops_are_those_of_a_dense_product():
    layer = prepacked_layer()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        layer(X)
    assert counter.get_total_flops() == 2 * 3 * 256 * 70
