"""Prepacked weights: the same products for any number of rows, held once, never stale."""

import copy
import io
import pickle
import threading

import pytest
import torch
from helpers import relative_error
from torch import nn
from torch.nn.utils import prune

import torch_onebit
from torch_onebit import OneBitEmbedding, OneBitLinear, PrepackedLinear, ops, tie

needs_kernel = pytest.mark.skipif(
    not ops.can_prepack(), reason="layers hold prepacked weights where kernels read them"
)

# rows, n, k, group, dtype of x, of scales, symmetric, and why
PRODUCTS = [
    (1, 64, 128, 128, torch.float32, torch.float16, False, "one tile, one group"),
    (2, 300, 4096, 128, torch.float32, torch.float32, False, "last tile incomplete"),
    (3, 65, 160, 32, torch.bfloat16, torch.bfloat16, True, "k of 5 words, below the int16 tables"),
    (4, 4200, 320, 64, torch.bfloat16, torch.float16, False, "two panels, int16 tables"),
    (1, 1, 2176, 64, torch.float16, torch.float16, True, "one output"),
    (4, 128, 1120, 32, torch.float32, torch.bfloat16, False, "k not a multiple of 128"),
    (5, 1100, 256, 128, torch.float32, torch.float32, False, "a tile of rows and one more"),
    (70, 130, 1280, 64, torch.bfloat16, torch.float16, True, "two blocks of rows, two of columns"),
    (131, 40, 256, 64, torch.float32, torch.float16, False, "fewer tiles of outputs than threads"),
    (2, 64, 128, 128, torch.float64, torch.float32, False, "float64 x: unpacked"),
    (2, 7, 128, 128, torch.bfloat16, torch.float32, False, "tiny: the scalar kernel"),
    (0, 64, 128, 128, torch.float32, torch.float32, False, "no rows"),
    (2, 0, 128, 128, torch.float32, torch.float32, False, "no outputs"),
    (2, 64, 0, 128, torch.float32, torch.float32, False, "nothing to sum"),
]


def weights(n: int, k: int, group: int, dtype: torch.dtype, symmetric: bool):
    packed, scales, biases = torch_onebit.quantize(torch.randn(n, k), group)
    return packed, scales.to(dtype), None if symmetric else biases.to(dtype)


@pytest.mark.filterwarnings("ignore:torch_onebit has no kernel of qmm_prepacked")
@pytest.mark.parametrize("case", PRODUCTS, ids=lambda c: c[-1])
def test_prepacked_product_is_qmm(case, isa):
    rows, n, k, group, dtype, level_dtype, symmetric, _ = case
    given = weights(n, k, group, level_dtype, symmetric)
    x = torch.randn(rows, k).to(dtype)
    y = ops.qmm_prepacked(x, ops.prepack(*given, group), n, k, group, level_dtype, symmetric)
    expected = torch_onebit.qmm(x.double(), *given, group)
    allowed = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}.get(dtype, 1e-12)
    assert y.dtype == dtype and y.shape == (rows, n)
    assert relative_error(y, expected.numpy()) <= allowed or not y.numel()


def test_results_do_not_depend_on_threads():
    threads, results = torch.get_num_threads(), []
    given = weights(70, 256, 64, torch.float16, False)
    x, prepacked = torch.randn(150, 256), ops.prepack(*given, 64)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.qmm_prepacked(x, prepacked, 70, 256, 64, torch.float16))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda c: c[-1])
def test_unprepack_gives_back_what_was_given(case):
    _, n, k, group, _, dtype, symmetric, _ = case
    given = weights(n, k, group, dtype, symmetric)
    back = ops.unprepack(ops.prepack(*given, group), n, k, group, dtype, symmetric)
    for a, b in zip(given, back, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


OTHERS = "prepacked must be what prepack of this version made of"
REFUSED = [
    (lambda p: {"prepacked": p[:-1]}, OTHERS, "cut short"),
    (lambda p: {"prepacked": p[:8]}, OTHERS, "shorter than a header"),
    (lambda p: {"prepacked": torch.zeros_like(p)}, OTHERS, "bytes of nothing"),
    (lambda p: {"prepacked": torch.cat([p[:15], p[15:16] + 1, p[16:]])}, OTHERS, "a later version"),
    (lambda p: {"rows": 63}, OTHERS, "other rows, as many bytes"),
    (lambda p: {"dtype": torch.float16}, OTHERS, "other levels"),
    (lambda p: {"dtype": torch.float16, "symmetric": True}, OTHERS, "no biases"),
    (lambda p: {"prepacked": p.int()}, "prepacked must be a contiguous uint8", "not bytes"),
    (lambda p: {"prepacked": p[None]}, "prepacked must be a contiguous uint8", "not a vector"),
    (lambda p: {"prepacked": p.new_empty(2 * len(p))[::2]}, "prepacked must be", "not contiguous"),
    (lambda p: {"rows": -1}, "rows must be at least 0", "negative rows"),
    (lambda p: {"rows": 2**62, "columns": 2**62}, "x must have a last", "sizes that overflow"),
    (lambda p: {"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16", "float64"),
    (lambda p: {"group_size": 33}, "group_size must be", "no group size"),
    (lambda p: {"columns": 100}, "columns must be whole groups", "not whole groups"),
    (lambda p: {"x": torch.randn(1, 64)}, "x must have a last dimension of 128", "x too short"),
    (lambda p: {"x": torch.randn(1, 128).int()}, "x must be float", "integer x"),
]


@pytest.mark.parametrize("change, message, why", REFUSED, ids=[row[2] for row in REFUSED])
def test_what_is_refused(change, message, why):
    prepacked = ops.prepack(*weights(64, 128, 128, torch.float32, False), 128)
    legal = {"x": torch.randn(1, 128), "prepacked": prepacked, "rows": 64, "columns": 128}
    legal |= {"group_size": 128, "dtype": torch.float32, "symmetric": False}
    with pytest.raises(ValueError, match=message):
        ops.qmm_prepacked(**(legal | change(prepacked)))


@pytest.mark.parametrize("op", ["prepack", "unprepack", "qmm_prepacked", "linear_prepacked"])
def test_opcheck(op):
    given = weights(64, 128, 128, torch.float32, False)
    prepacked = ops.prepack(*given, 128)
    x, bias = torch.randn(2, 128, requires_grad=True), torch.randn(64, requires_grad=True)
    form = (64, 128, 128, torch.float32, False)
    arguments = {
        "prepack": (*given, 128),
        "unprepack": (prepacked, *form),
        "qmm_prepacked": (x, prepacked, *form),
        "linear_prepacked": (x, prepacked, bias, *form),
    }[op]
    torch.library.opcheck(getattr(torch.ops.onebit, op).default, arguments)


def test_gradients_of_x_are_those_of_qmm():
    given = weights(64, 128, 64, torch.float32, False)
    prepacked = ops.prepack(*given, 64)
    x = torch.randn(2, 128, dtype=torch.float64, requires_grad=True)

    def product(x):
        return ops.qmm_prepacked(x, prepacked, 64, 128, 64)

    assert torch.autograd.gradcheck(product, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, x)


def make_layer(**options) -> OneBitLinear:
    layer = OneBitLinear(256, 70, **options).eval()
    with torch.no_grad():
        layer.scales.mul_(torch.rand_like(layer.scales) + 0.5)
    return layer


def prepacked_layer(**options) -> PrepackedLinear:
    layer = make_layer(**options)
    layer.prepack()
    assert type(layer) is PrepackedLinear
    return layer


X = torch.linspace(-1, 2, 3 * 256).view(3, 256)


def shown(layer: nn.Module) -> torch.Tensor:
    """The product with the weights that the layer shows, by plain torch."""
    bias = 0 if layer.bias is None else layer.bias
    return X[:, : layer.in_features] @ layer.dequantize().float().T + bias


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


def zoo() -> nn.ModuleDict:
    model = nn.ModuleDict(
        {
            "up": OneBitLinear(128, 256),
            "wide": OneBitLinear(128, 64, dtype=torch.float64),
            "trained": OneBitLinear(128, 64).requires_grad_(),
            "head": OneBitLinear(128, 10),
            "rows": OneBitEmbedding(10, 128),
            "one": OneBitLinear(128, 64),
            "two": OneBitLinear(128, 64),
        }
    )
    tie(model["rows"], model["head"])
    model["two"].weight = model["one"].weight
    return model


@needs_kernel
def test_prepack_reports_bytes_and_what_it_left_alone():
    model = zoo()
    report = torch_onebit.report(torch_onebit.prepack_(model, skip=["rows"]))
    [row] = report.layers
    size = 256 * (128 // 8 + 2 * 4)
    assert (row.name, row.kind) == ("up", "PrepackedLinear")
    assert (row.bytes_before, row.bytes_after) == (size, size + 64)
    assert report.bits_per_weight == 8 * (size + 64) / (256 * 128)
    left = {row.name: row.reason for row in report.left}
    assert left["wide"].startswith("scales must have at most 32 bits")
    assert left["trained"].startswith("scales and biases must not require grad")
    assert left["head"].startswith("weight must be of this layer alone")
    assert left["one"] == left["two"] == "another layer has its weights too"
    with pytest.warns(UserWarning, match="prepacked already"):
        torch_onebit.prepack_(model, skip=["wide", "trained", "head", "one", "two"])
    str(report)
    torch_onebit.count_parameters(model)
    assert type(model["up"]) is PrepackedLinear  # nor did reports change it
    assert type(torch_onebit.unprepack_(model)["up"]) is OneBitLinear


def test_warns_where_kernels_have_no_such_form():
    isa = ops.cpu_isa()
    torch.ops.onebit.set_cpu_isa("scalar")
    try:
        model = nn.Sequential(OneBitLinear(128, 64))
        with pytest.warns(UserWarning, match="kernels"):
            torch_onebit.prepack_(model)
        assert type(model[0]) is OneBitLinear
        with pytest.raises(NotImplementedError, match="got scalar ones"):
            model[0].prepack()
    finally:
        torch.ops.onebit.set_cpu_isa(isa)


# What is done to models, with prepacked layers in them.
def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(OneBitLinear(256, 128, symmetric=True), OneBitLinear(128, 70))
    return model.eval()


def reload(model, tmp_path):
    torch_onebit.save_checkpoint(model, tmp_path)
    return torch_onebit.load_checkpoint(tmp_path, sequential(), symmetrize=True)


def average(kind):
    def run(model, tmp_path):
        averaged = kind(model)  # a deep copy
        averaged.update_parameters(sequential())
        model.unprepack() if hasattr(model, "unprepack") else torch_onebit.unprepack_(model)
        averaged.update_parameters(model)
        return averaged

    return run


DONE = {
    "dequantize_": lambda m, _: torch_onebit.dequantize_(m),
    "prepare_qat_ and convert_": lambda m, _: torch_onebit.convert_(torch_onebit.prepare_qat_(m)),
    "add_lora_": lambda m, _: torch_onebit.add_lora_(m, rank=1),
    "symmetrize_": lambda m, _: torch_onebit.symmetrize_(m),
    "add_lora_, then prepack_": lambda m, _: torch_onebit.prepack_(
        torch_onebit.unprepack_(torch_onebit.add_lora_(m, rank=1))
    ),
    "a checkpoint": reload,
    "AveragedModel of PyTorch": average(torch.optim.swa_utils.AveragedModel),
    "AveragedModel": average(torch_onebit.AveragedModel),
}


@needs_kernel
@pytest.mark.filterwarnings("ignore:symmetrize_ swapped nothing")
@pytest.mark.parametrize("what", DONE)
def test_models_with_prepacked_layers(what, tmp_path):
    model, expected = sequential(), sequential()(X)
    torch_onebit.prepack_(model)
    torch.testing.assert_close(model(X), expected)
    torch.testing.assert_close(DONE[what](model, tmp_path).eval()(X), expected)


@needs_kernel
def test_flops_are_those_of_a_dense_product():
    layer = prepacked_layer()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        layer(X)
    assert counter.get_total_flops() == 2 * 3 * 256 * 70
