"""quantize_ and dequantize_: what is swapped, what is left, and what stays shared."""

import inspect
import tempfile
from functools import partial

import pytest
import torch
from torch import nn

import torch_onebit
from torch_onebit import OneBitEmbedding, OneBitLinear, dequantize_, quantize_, report


class Model(nn.Module):
    """An embedding, two blocks, a layer whose columns no group divides and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 128)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 128), nn.ReLU()) for _ in range(2))
        self.odd = nn.Linear(100, 128)
        self.norm = nn.LayerNorm(128)
        self.head = nn.Linear(128, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, indices):
        h = self.embed(indices)
        for block in self.blocks:
            h = h + block(h)
        return self.head(self.norm(h + self.odd(h[..., :100])))


def kinds(model: nn.Module) -> dict[str, type]:
    layers = (nn.Linear, nn.Embedding, OneBitLinear, OneBitEmbedding)
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, layers)}


def test_every_layer_is_swapped_in_place():
    model = Model()
    assert quantize_(model) is model
    assert kinds(model) == {
        "embed": OneBitEmbedding,
        "blocks.0.0": OneBitLinear,
        "blocks.1.0": OneBitLinear,
        "odd": OneBitLinear,
        "head": OneBitLinear,
    }
    assert torch.isfinite(model(torch.arange(6).view(2, 3))).all()


def test_report_counts_layers_bits_and_bytes():
    found = report(quantize_(Model(), skip=["odd"]))
    assert [row.name for row in found.layers] == ["embed", "blocks.0.0", "blocks.1.0", "head"]
    weights = (50 + 128 + 128 + 50) * 128
    assert found.bytes_before == weights * 4
    assert found.bytes_after == weights // 8 + weights // 128 * 8
    assert found.bits_per_weight == pytest.approx(1.5)
    odd, vectors = found.left
    assert (odd.name, odd.shape, odd.bytes) == ("odd", (128, 100), 128 * 100 * 4)
    assert vectors.bytes == (3 + 2) * 128 * 4  # biases and the norm
    assert found.bytes_left == odd.bytes + vectors.bytes
    text = str(found)
    assert "4 layers, 1.500 bits per packed weight" in text
    assert "skip has 'odd'" in text


FILTERS = [
    ("nothing", lambda m, n: False, {}, []),
    (
        "linear only",
        lambda m, n: isinstance(m, nn.Linear),
        {},
        ["blocks.0.0", "blocks.1.0", "odd", "head"],
    ),
    ("by name", lambda m, n: n.startswith("blocks.1"), {}, ["blocks.1.0"]),
    (
        "options per layer",
        lambda m, n: {"group_size": 32} if n == "head" else n == "embed",
        {"symmetric": True},
        ["embed", "head"],
    ),
]


@pytest.mark.parametrize("why, filter_fn, options, names", FILTERS, ids=[row[0] for row in FILTERS])
def test_filter_chooses_layers(why, filter_fn, options, names):
    model = quantize_(Model(), filter_fn=filter_fn, **options)
    assert [row.name for row in report(model).layers] == names
    swapped = [n for n, kind in kinds(model).items() if kind in (OneBitLinear, OneBitEmbedding)]
    assert swapped == names
    if why == "options per layer":
        assert (model.head.group_size, model.embed.group_size) == (32, 128)
        assert model.head.symmetric
        assert model.embed.symmetric


def test_tied_weights_stay_tied_both_ways():
    model = quantize_(Model(tied=True))
    assert model.head.weight is model.embed.weight
    assert model.head.scales is model.embed.scales
    found = report(model)
    assert found.bytes_before == ((50 + 128 + 128) * 128 + 128 * 100) * 4
    assert [row.note for row in found.layers if row.name == "head"] == ["tied to embed"]
    model.to("meta")
    assert model.head.weight is model.embed.weight
    model = dequantize_(quantize_(Model(tied=True)))
    assert model.head.weight is model.embed.weight


def through_training(model):
    return torch_onebit.convert_(torch_onebit.prepare_qat_(model))


@pytest.mark.parametrize("swap", [torch_onebit.dequantize_, through_training])
def test_layers_that_share_words_and_not_levels_keep_their_weights(swap):
    model = nn.Sequential(nn.Embedding(7, 128), nn.Linear(128, 7))
    model[1].weight = model[0].weight
    torch_onebit.quantize_(model, group_size=64)
    model[0].biases = nn.Parameter(model[0].biases * 3)
    before = [layer.dequantize() for layer in model]
    assert not torch.equal(*before)
    swap(model)
    for layer, w in zip(model, before, strict=True):
        now = layer.dequantize() if hasattr(layer, "dequantize") else layer.weight
        torch.testing.assert_close(now, w)


def test_a_layer_with_two_names_stays_one_layer():
    shared = nn.Linear(128, 128)
    model = quantize_(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2]
    assert len(report(model).layers) == 1


def test_dequantize_is_the_inverse():
    model = quantize_(Model(), group_size=32)
    indices = torch.arange(8)
    expected = model(indices)
    assert dequantize_(model) is model
    assert set(kinds(model).values()) == {nn.Linear, nn.Embedding}
    torch.testing.assert_close(model(indices), expected)
    assert {row.steps for row in report(model).layers} == {("quantize_", "dequantize_")}
    assert report(model).bits_per_weight == 0
    again = quantize_(model, group_size=32)  # two-level weights: nothing more is lost
    torch.testing.assert_close(again(indices), expected)


def test_training_mode_device_and_dtype_are_kept():
    model = quantize_(Model().eval().to(torch.bfloat16))
    assert not any(m.training for m in model.modules())
    assert model.head.scales.dtype == torch.bfloat16


def test_a_whole_model_compiles_in_one_graph():
    model = quantize_(Model())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for shape in ((2, 3), (4, 5)):
        indices = torch.randint(0, 50, shape)
        torch.testing.assert_close(compiled(indices), model(indices))


ERRORS = [
    (lambda: quantize_(nn.Linear(128, 8)), "model must contain the layers to swap, got Linear"),
    (lambda: quantize_(Model(), group_size=48), "group_size must be 32, 64 or 128, got 48"),
    (
        lambda: quantize_(Model(), filter_fn=lambda m, n: {"bits": 2}),
        r"filter_fn must return options among .* got \['bits'\]",
    ),
    (lambda: dequantize_(OneBitLinear(128, 8)), "model must contain the layers to swap"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=[row[1] for row in ERRORS])
def test_illegal_request_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("last", [{"group_size": 48}, {"method": "best"}, {"method": "calibrated"}])
def test_refused_request_changes_nothing(last):
    model = Model()
    with pytest.raises(ValueError, match=f"{next(iter(last))} must"):
        quantize_(model, filter_fn=lambda m, n: n != "head" or last)
    assert set(kinds(model).values()) == {nn.Linear, nn.Embedding}


def reloaded(load, save) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        save(quantize_(Model(), skip=["odd"]), folder)
        return load(folder, Model(), progress=False)


def refused(error: type[Exception], call, *arguments) -> None:
    with pytest.raises(error):
        call(*arguments)


PACKED = torch_onebit.quantize(torch.randn(4, 32), 32)
CALLS = {  # every public function, through the package: none is hidden by a module of its name
    "add_lora_": lambda f: f(quantize_(Model()), rank=1, progress=False),
    "affine_grad": lambda f: f(torch.randn(2, 4), torch.randn(2, 32), PACKED[0], group_size=32),
    "calibrate_": lambda f: f(Model(), [torch.arange(3)], skip=["*.*", "odd"], progress=False),
    "convert_": lambda f: f(torch_onebit.prepare_qat_(Model())),
    "count_parameters": lambda f: f(Model()),
    "dequantize": lambda f: f(*PACKED, 32),
    "dequantize_": lambda f: f(quantize_(Model())),
    "distillation_loss": lambda f: f(
        torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0, 1]), weight=0.5
    ),
    "compile_options": lambda f: f(),
    "embedding": lambda f: f(torch.tensor([1]), *PACKED, 32),
    "gather_qmm": lambda f: f(torch.randn(1, 2, 32), *PACKED, group_size=32),
    "export_gguf": lambda f: refused(ValueError, f, quantize_(Model()), "model.gguf"),
    "load_gguf": lambda f: refused(ValueError, f, "nowhere.gguf"),
    "onnx_translations": lambda f: f(),
    "load_checkpoint": lambda f: reloaded(f, torch_onebit.save_checkpoint),
    "linear": lambda f: f(torch.randn(2, 32), *PACKED, group_size=32),
    "pack_bits": lambda f: f(torch.ones(32, dtype=torch.bool)),
    "parameter_groups": lambda f: f(Model()),
    "prepack": lambda f: f(*PACKED, 32),
    "prepack_": lambda f: f(quantize_(Model())),
    "prepare_qat_": lambda f: f(Model()),
    "qmm_prepacked": lambda f: f(torch.randn(2, 32), torch_onebit.prepack(*PACKED, 32), 4, 32, 32),
    "unprepack": lambda f: f(torch_onebit.prepack(*PACKED, 32), 4, 32, 32),
    "unprepack_": lambda f: f(quantize_(Model())),
    "qmm": lambda f: f(torch.randn(2, 32), *PACKED, 32),
    "quantize": lambda f: f(torch.randn(4, 32), 32),
    "quantize_": lambda f: f(Model()),
    "quantize_levels": lambda f: f(torch.randn(4, 32), "mean", 32),
    "quantize_weight": lambda f: f(torch.randn(4, 32), "mean", 32),
    "report": lambda f: f(quantize_(Model())),
    "thaw_levels_": lambda f: f(quantize_(Model())),
    "thaw_lora_": lambda f: f(quantize_(Model())),
    "save_checkpoint": lambda f: reloaded(torch_onebit.load_checkpoint, f),
    "symmetrize_": lambda f: f(quantize_(Model())),
    "tie": lambda f: f(OneBitLinear(32, 4, group_size=32), OneBitLinear(32, 4, group_size=32)),
    "unpack_bits": lambda f: f(PACKED[0]),
}


@pytest.mark.filterwarnings("ignore:(prepack_|symmetrize_) swapped nothing")
def test_every_public_name_is_what_it_is_called():
    names = set(torch_onebit.__all__)
    classes = {n for n in names if isinstance(getattr(torch_onebit, n), type)}
    assert names - classes - {"METHODS"} == CALLS.keys()
    for name, call in CALLS.items():
        call(getattr(torch_onebit, name))


SURGERY = ["add_lora_", "calibrate_", "convert_", "dequantize_", "prepack_", "prepare_qat_"]
SURGERY += ["quantize_", "symmetrize_"]
CHANGES = ["thaw_levels_", "thaw_lora_", "unprepack_"]  # of layers that stay


# argument of every in-place function, what is refused, the error
REFUSED = {
    "model": (lambda f: f(torch.randn(3)), "model must be an nn.Module, got"),
    "filter_fn": (lambda f: f(Model(), filter_fn="odd"), "filter_fn must be callable, got"),
    "skip": (lambda f: f(Model(), skip="odd"), "skip must be .*, got"),
}


@pytest.mark.parametrize("name", SURGERY + CHANGES)
@pytest.mark.filterwarnings("ignore:(prepack_|symmetrize_) swapped nothing")
def test_in_place_functions_have_one_convention(name):
    function = getattr(torch_onebit, name)
    signature = inspect.signature(function)
    parameters = signature.parameters
    assert next(iter(parameters)) == "model"
    for wanted in ("filter_fn", "skip", "progress"):
        assert parameters[wanted].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["progress"].default is True and parameters["filter_fn"].default is None
    assert signature.return_annotation in (nn.Module, "nn.Module")
    made = []

    def call(model, *arguments, **options):
        made.append(model)
        return function(model, *arguments, **options)

    assert CALLS[name](call) is made[0]


@pytest.mark.parametrize("name", SURGERY + CHANGES)
@pytest.mark.parametrize("argument", REFUSED)
def test_in_place_functions_refuse_in_the_same_words(name, argument):
    function = getattr(torch_onebit, name)
    call, message = REFUSED[argument]
    batches = {"batches": [torch.arange(3)]} if name == "calibrate_" else {}
    with pytest.raises(TypeError, match=message):
        call(partial(function, **batches))


def test_every_in_place_function_is_in_that_list():
    assert {n for n in torch_onebit.__all__ if n.endswith("_")} == {*SURGERY, *CHANGES}


def test_levels_and_low_rank_products_train_where_they_are_wanted():
    model = torch_onebit.add_lora_(quantize_(Model()), rank=1)
    model.requires_grad_(False)
    name = next(n for n, m in model.named_modules() if isinstance(m, torch_onebit.LoRALinear))
    torch_onebit.thaw_lora_(model, skip=[name])
    assert not any(p.requires_grad for p in model.get_submodule(name).parameters())
    assert any(p.requires_grad for p in model.parameters())
    model.requires_grad_(False)
    torch_onebit.thaw_levels_(model, filter_fn=lambda m, n: n == f"{name}.base")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{name}.base.scales", f"{name}.base.biases"]
    with pytest.warns(UserWarning, match="no layer has a name that matches 'nowhere'"):
        torch_onebit.thaw_levels_(model, skip=["nowhere"])


@pytest.mark.parametrize("language", ["Python", "schema"])
def test_group_size_has_one_default(language):
    found = 0
    for name in torch_onebit.ops.__all__:
        function = getattr(torch_onebit.ops, name)
        if language == "Python" and inspect.isfunction(function):
            parameters = inspect.signature(function).parameters
            default = parameters["group_size"].default if "group_size" in parameters else None
        else:
            op = getattr(torch.ops.onebit, name, None)
            arguments = op.default._schema.arguments if op else []
            default = next((a.default_value for a in arguments if a.name == "group_size"), None)
        if default is not None:
            found += 1
            assert default == 128, name
    assert found >= 10
