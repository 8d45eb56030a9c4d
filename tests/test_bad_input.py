"""Bad input to the Python API: `<argument> must <rule>, got <value>`, and nothing has changed."""

import inspect
import math
import re

import pytest
import torch
from torch import nn

from torch_onebit import (
    CalibrationOptions,
    Distillation,
    LoRALinear,
    OneBitEmbedding,
    OneBitExperts,
    OneBitLinear,
    QATEmbedding,
    QATExperts,
    QATLinear,
    add_lora_,
    calibrate_,
    convert_,
    dequantize_,
    ops,
    pack_bits,
    prepare_qat_,
    quantize_,
    quantize_weight,
    thaw_levels_,
    tie,
    unpack_bits,
)

CONV = nn.Conv2d(1, 1, 1)
X = torch.ones(4, 128)


def plain() -> nn.Module:
    return nn.Sequential(nn.Embedding(10, 128), nn.Linear(128, 128), nn.Linear(128, 8))


def packed() -> nn.Module:
    return quantize_(plain(), group_size=64)


def last(**options):
    """A filter that accepts everything and wants options for the last layer."""
    return lambda module, name: options if name == "2" else True


def words_as(dtype: torch.dtype):
    """A checkpoint whose words went through another dtype."""
    return {
        k: v.to(dtype) if v.dtype == torch.int32 else v for k, v in packed().state_dict().items()
    }


def levels_as(dtype: torch.dtype):
    """A checkpoint whose levels are of another dtype."""
    return {k: v.to(dtype) if k.endswith("scales") else v for k, v in packed().state_dict().items()}


# (a model, what is done to it, how the error reads)
MODELS = [
    (plain, lambda m: quantize_(m, group_size="64"), "group_size must be 32, 64 or 128, got '64'"),
    (plain, lambda m: quantize_(m, group_size=64.0), "group_size must be 32, 64 or 128, got 64.0"),
    (plain, lambda m: quantize_(m, group_size=True), "group_size must be 32, 64 or 128, got True"),
    (plain, lambda m: quantize_(m, method="best"), "method must be one of minmax, "),
    (
        lambda: prepare_qat_(plain(), group_size=64),
        lambda m: convert_(m, dtype=torch.int32),
        "dtype must be float32, float16, bfloat16 or float64, got torch.int32",
    ),
    (
        lambda: prepare_qat_(plain(), group_size=64),
        lambda m: convert_(m, dtype="half"),
        "dtype must be float32, float16, bfloat16 or float64, got 'half'",
    ),
    (plain, lambda m: calibrate_(m[1], [torch.ones(1, 128)]), "model must contain the layers"),
    (
        plain,
        lambda m: calibrate_(m, torch.zeros(4, 2, dtype=torch.int64)),
        "batches must be an iterable of batches, such as a list, got Tensor",
    ),
    (plain, lambda m: calibrate_(m, None), "batches must be an iterable of batches"),
    (plain, lambda m: quantize_(m, method="calibrated"), "method must be one of minmax, "),
    (
        plain,
        lambda m: quantize_(m, method="mean", symmetric=True),
        "method must be one of sign, optimal for symmetric weights, got mean",
    ),
    (plain, lambda m: quantize_(m, filter_fn=last(method="best")), "method must be one of minmax"),
    (
        plain,
        lambda m: quantize_(m, filter_fn=last(method="minmax", symmetric=True)),
        "method must be one of sign, optimal",
    ),
    (plain, lambda m: quantize_(m, filter_fn=last(group_size=48)), "group_size must be 32, 64"),
    (plain, lambda m: quantize_(m, filter_fn="x"), "filter_fn must be callable, got 'x'"),
    (packed, lambda m: add_lora_(m, rank=0), "rank must be an integer of at least 1, got 0"),
    (packed, lambda m: add_lora_(m, rank=1.5), "rank must be an integer of at least 1, got 1.5"),
    (packed, lambda m: add_lora_(m, alpha=math.nan), "alpha must be a finite number, got nan"),
    (packed, lambda m: add_lora_(m, alpha="a"), "alpha must be a finite number, got 'a'"),
    (packed, lambda m: add_lora_(m, filter_fn=last(rank=0)), "rank must be an integer of at least"),
    (packed, lambda m: add_lora_(m, filter_fn=last(r=4)), "filter_fn must return options among"),
    (
        lambda: OneBitLinear(128, 8),
        add_lora_,
        "model must contain the layers to swap, got OneBitLinear itself",
    ),
    *(
        (packed, lambda m, d=d: m.load_state_dict(words_as(d)), f"1.weight must be int32 .* {d}")
        for d in (torch.float32, torch.int64, torch.uint8)
    ),
    *(
        (
            packed,
            lambda m, d=d, a=a: m.load_state_dict(levels_as(d), assign=a),
            f"2.scales must be float32, .* got {d}",
        )
        for d in (torch.int32, torch.complex64, torch.bool)
        for a in (False, True)
    ),
    (
        packed,
        lambda m: m.load_state_dict(words_as(torch.float32), assign=True),
        "1.weight must be int32 .* got torch.float32",
    ),
    *(
        (packed, lambda m, f=f: f("model"), "model must be an nn.Module, got str")
        for f in (quantize_, dequantize_, add_lora_, thaw_levels_)
    ),
]


def state(model: nn.Module):
    return [(n, type(m)) for n, m in model.named_modules()], dict(model.state_dict(keep_vars=True))


@pytest.mark.parametrize("make, call, message", MODELS, ids=[row[2] for row in MODELS])
def test_refused_change_leaves_the_model_as_it_was(make, call, message):
    model = make()
    kinds, tensors = state(model)
    values = {name: t.clone() for name, t in tensors.items()}
    # load_state_dict collects what layers say into a RuntimeError of its own.
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        call(model)
    kinds_after, tensors_after = state(model)
    assert kinds_after == kinds
    assert tensors_after.keys() == tensors.keys()
    for name, t in tensors_after.items():
        assert t is tensors[name]
        assert torch.equal(t, values[name])


LAYERS = [
    (lambda: OneBitLinear(-128, 8), "in_features must be an integer of at least 0, got -128"),
    (lambda: OneBitLinear(128, -1), "out_features must be an integer of at least 0, got -1"),
    (lambda: OneBitLinear(128.0, 8), "in_features must be an integer of at least 0, got 128.0"),
    (lambda: OneBitLinear("128", 8), "in_features must be an integer of at least 0, got '128'"),
    (lambda: OneBitLinear(128, 8, group_size=64.0), "group_size must be 32, 64 or 128, got 64.0"),
    *(
        (lambda d=d: OneBitLinear(128, 8, dtype=d), f"dtype must be float32, .* got {d}")
        for d in (torch.int32, torch.complex64, torch.float8_e4m3fn)
    ),
    (lambda: OneBitEmbedding(-1, 128), "num_embeddings must be an integer of at least 0, got -1"),
    (lambda: OneBitEmbedding(8, 128, 1.5), "padding_idx must be an integer .* got 1.5"),
    (lambda: OneBitEmbedding(8, 128, "a"), "padding_idx must be an integer .* got 'a'"),
    (lambda: OneBitLinear.from_linear(CONV), "linear must be an nn.Linear, got Conv2d"),
    (lambda: OneBitEmbedding.from_embedding(CONV), "embedding must be an nn.Embedding, got Conv2d"),
    (lambda: QATLinear(CONV), "linear must be an nn.Linear or OneBitLinear, got Conv2d"),
    (lambda: QATEmbedding(CONV), "embedding must be an nn.Embedding or OneBitEmbedding, got Conv"),
    (lambda: LoRALinear(nn.Linear(8, 8)), "base must be a OneBitLinear, got Linear"),
    *(
        (
            lambda v=v: OneBitLinear.from_linear(
                nn.Linear(128, 8), importance=torch.full((128,), v)
            ),
            "importance must not be negative or NaN, got",
        )
        for v in (-1.0, math.nan)
    ),
    (lambda: CalibrationOptions(rounds=1.5), "rounds must be an integer of at least 0, got 1.5"),
    (lambda: CalibrationOptions(damping="x"), "damping must be a finite number of .* got 'x'"),
    (lambda: thaw_levels_(packed(), skip="head"), "skip must be a list of patterns .* got 'head'"),
    (lambda: Distillation("x"), "teacher must be callable, got 'x'"),
    (lambda: Distillation(abs, weight=math.nan), "weight must be between 0 and 1, got nan"),
    (lambda: Distillation(abs, temperature=math.nan), "temperature must be above 0 .* got nan"),
    (lambda: Distillation(abs, temperature=math.inf), "temperature must be above 0 .* got inf"),
    (
        lambda: Distillation(nn.Linear(2, 3))(
            torch.randn(4, 5), torch.zeros(4).long(), torch.randn(4, 2)
        ),
        re.escape("teacher must give logits [4, 5] as the student, got [4, 3]"),
    ),
    (
        lambda: Distillation(nn.Linear(2, 5))(
            torch.randn(4, 5), torch.zeros(4).long(), torch.randn(1, 2)
        ),
        re.escape("teacher must give logits [4, 5] as the student, got [1, 5]"),
    ),
]


@pytest.mark.parametrize("call, message", LAYERS, ids=[row[1] for row in LAYERS])
def test_illegal_argument_is_named_with_its_rule_and_value(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


WRONG_TYPES = [
    (lambda: OneBitLinear("128", 8), "in_features must be an integer of at least 0, got '128'"),
    (lambda: OneBitLinear(128, 8, group_size="64"), "group_size must be 32, 64 or 128, got '64'"),
    (lambda: OneBitLinear(128, 8, dtype="half"), "dtype must be float32, .* got 'half'"),
    (lambda: OneBitEmbedding(8, 128, 1.5), "padding_idx must be an integer .* got 1.5"),
    (lambda: OneBitEmbedding(8, 128, output_dtype=16), "output_dtype must be float32, .* got 16"),
    (lambda: OneBitLinear.from_linear(CONV), "linear must be an nn.Linear, got Conv2d"),
    (lambda: QATEmbedding(CONV), "embedding must be an nn.Embedding or OneBitEmbedding, got Conv"),
    (lambda: LoRALinear(OneBitLinear(128, 8), alpha="a"), "alpha must be a finite number, got 'a'"),
    (lambda: CalibrationOptions(rounds=1.5), "rounds must be an integer of at least 0, got 1.5"),
    (lambda: CalibrationOptions(damping="x"), "damping must be a finite number of .* got 'x'"),
    (lambda: thaw_levels_(packed(), skip="head"), "skip must be a list of patterns .* got 'head'"),
    (lambda: Distillation("x"), "teacher must be callable, got 'x'"),
    (lambda: quantize_("model"), "model must be an nn.Module, got str"),
    (lambda: quantize_(plain(), filter_fn="x"), "filter_fn must be callable, got 'x'"),
    (lambda: quantize_(plain(), skip="head"), "skip must be a list of patterns .* got 'head'"),
    (lambda: quantize_(plain(), skip=[1]), r"skip must be a list of patterns .* got \[1\]"),
    (lambda: convert_(plain(), dtype="half"), "dtype must be float32, .* got 'half'"),
    (lambda: calibrate_(plain(), [], options="x"), "options must be CalibrationOptions, got str"),
    (lambda: calibrate_(plain(), 3), "batches must be an iterable of batches, .* got int"),
    (lambda: calibrate_(plain(), {"x": X}), "batches must be an iterable of .* got dict"),
    (lambda: tie(OneBitLinear(128, 8), "head"), "second must be a OneBitModule, got str"),
    (lambda: OneBitExperts("e", X, X, X), "experts must be an nn.Module, got str"),
    (lambda: QATExperts("e"), "experts must be an nn.Module, got str"),
    (lambda: quantize_weight("w"), "w must be a tensor, got str"),
    (lambda: quantize_weight(X, importance=1), "importance must be a tensor or None, got int"),
    (lambda: quantize_weight(X, moments=1), "moments must be a tensor or None, got int"),
    (lambda: pack_bits([True]), "bits must be a tensor, got list"),
    (lambda: unpack_bits([7]), "packed must be a tensor, got list"),
    (lambda: ops.quantize_affine("w", X, X), "w must be a tensor, got str"),
    (lambda: ops.quantize_affine(X, X, None), "biases must be a tensor, got NoneType"),
]


@pytest.mark.parametrize("call, message", WRONG_TYPES, ids=[row[1] for row in WRONG_TYPES])
def test_a_value_of_the_wrong_type_is_a_type_error(call, message):
    with pytest.raises(TypeError, match=message):
        call()


OPERATORS = [
    ("quantize", "group_size", "32", "an int, got str"),
    ("quantize", "group_size", 32.0, "an int, got float"),
    ("quantize", "w", [1.0], "a tensor, got list"),
    ("dequantize", "scales", 1.0, "a tensor, got float"),
    ("dequantize", "biases", 1.0, "a tensor or None, got float"),
    ("embedding", "indices", 3, "a tensor, got int"),
    ("qmm", "x", "x", "a tensor, got str"),
    ("qmm", "transpose", "no", "a bool, got str"),
    ("linear", "bias", 1.5, "a tensor or None, got float"),
    ("gather_qmm", "rhs_indices", [0], "a tensor or None, got list"),
    ("affine_grad", "grad", {}, "a tensor, got dict"),
    ("prepack", "group_size", None, "an int, got None"),
    ("unprepack", "rows", "1", "an int, got str"),
    ("unprepack", "dtype", "half", "a torch.dtype, got str"),
    ("qmm_prepacked", "symmetric", "no", "a bool, got str"),
    ("quantize_levels", "rule", 3, "a str, got int"),
    ("quantize_levels", "importance", "x", "a tensor or None, got str"),
    ("fake_quantize", "dtype", "half", "a torch.dtype or None, got str"),
    ("fake_quantize_backward", "grad", 1, "a tensor, got int"),
    ("fake_quantize_affine", "biases", 1, "a tensor, got int"),
    ("quantize_affine", "group_size", "32", "an int, got str"),
    ("fake_quantize_affine_backward", "grad", 1, "a tensor, got int"),
]


@pytest.mark.parametrize("op, name, value, message", OPERATORS)
def test_an_operator_names_an_argument_of_the_wrong_type(op, name, value, message):
    """Not in the words of torch's dispatcher, which raises a RuntimeError."""
    operator = getattr(ops, op)
    arguments = {}
    for parameter in inspect.signature(operator).parameters.values():
        if parameter.default is not parameter.empty:
            continue
        arguments[parameter.name] = {"rule": "sign", "rows": 4, "columns": 32}.get(
            parameter.name, torch.ones(4, 32)
        )
    with pytest.raises(TypeError, match=f"^{name} must be {re.escape(message)}$"):
        operator(**{**arguments, name: value})


def test_filter_gives_lora_options_per_layer():
    model = add_lora_(packed(), rank=2, filter_fn=last(rank=4, alpha=8.0))
    assert (len(model[1].lora_a), len(model[2].lora_a), model[2].scaling) == (2, 4, 2.0)


def test_prepared_layers_keep_what_they_are():
    """prepare_qat_ twice, quantize_ after it: layers that are done are left."""
    model = prepare_qat_(plain(), group_size=64)
    before = list(model)
    assert list(prepare_qat_(model, group_size=64)) == before
    assert list(quantize_(model, group_size=64)) == before
