"""Every illegal call raises `<argument> must <rule>, got <value>`, the same on cpu and meta."""

import pytest
import torch
from helpers import make_weights

ops = torch.ops.onebit


def valid(op: str) -> dict:
    """Arguments that the operator accepts; the table below spoils one at a time."""
    packed, scales, biases = make_weights(6, 128, group_size=64)
    weights = {"packed": packed, "scales": scales, "biases": biases}
    if op == "quantize":
        return {"w": torch.randn(6, 128), "group_size": 64}
    if op == "dequantize":
        return {**weights, "group_size": 64}
    if op == "embedding":
        return {"indices": torch.tensor([0, 5]), **weights, "group_size": 64}
    if op == "prepack":
        return {**weights, "group_size": 64}
    x = {"x": torch.randn(3, 128)}
    if op == "qmm":
        return {**x, **weights, "group_size": 64}
    if op == "linear":
        return {**x, **weights, "bias": torch.randn(6), "group_size": 64}
    if op in ("unprepack", "qmm_prepacked", "linear_prepacked"):
        prepacked = ops.prepack(packed, scales, biases, 64)
        form = {"rows": 6, "columns": 128, "group_size": 64}
        form |= {"dtype": torch.float32, "symmetric": False}
        if op == "unprepack":
            return {"prepacked": prepacked, **form}
        return {**x, "prepacked": prepacked, **form} | (
            {"bias": torch.randn(6)} if op == "linear_prepacked" else {}
        )
    if op in LEVEL_OPS:
        return valid_levels(op)
    stacked = {name: torch.stack([t, t]) for name, t in weights.items()}
    indices = {"lhs_indices": None, "rhs_indices": torch.tensor([0, 1, 1])}
    if op == "gather_qmm":
        return {"x": torch.randn(3, 1, 128), **stacked, **indices, "group_size": 64}
    arguments = {"grad": torch.randn(3, 1, 6), "x": torch.randn(3, 1, 128)}
    return {**arguments, "packed": stacked["packed"], **indices, "group_size": 64}


def valid_levels(op: str) -> dict:
    w, grad, importance = torch.randn(6, 128), torch.randn(6, 128), torch.rand(128)
    scales, biases = torch.rand(6, 2), torch.randn(6, 2)
    affine = {"w": w, "scales": scales, "biases": biases, "group_size": 64}
    return {
        "quantize_levels": {"w": w, "rule": "sign", "group_size": 64, "importance": importance},
        "fake_quantize": {"w": w, "rule": "mean", "group_size": 64},
        "fake_quantize_backward": {"grad": grad, "w": w, "rule": "mean", "group_size": 64},
        "fake_quantize_affine": affine,
        "fake_quantize_affine_backward": {"grad": grad, **affine},
        "flip_bits_": {
            "bits": w > 0,
            "error": grad,
            "scales": scales,
            "moments": torch.eye(128),
            "begin": 0,
            "end": 128,
            "group_size": 64,
        },
        "descend_": {
            "bits": w > 0,
            "error": grad,
            "scales": scales,
            "moments": torch.eye(128),
            "group_size": 64,
            "sweeps": 2,
        },
    }[op]


LEVEL_OPS = (
    "quantize_levels",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_affine",
    "fake_quantize_affine_backward",
    "flip_bits_",
    "descend_",
)
WEIGHT_OPS = ("dequantize", "embedding", "qmm", "gather_qmm")
PRODUCTS = ("qmm", "gather_qmm", "affine_grad")
ALL = (*WEIGHT_OPS, "affine_grad")
LINEAR = ("prepack", "unprepack", "linear", "qmm_prepacked", "linear_prepacked")

# operators, argument, how to spoil it, start of the message, end of it
RULES = [
    (("quantize", *ALL), "group_size", lambda t: 16, "group_size must be 32, 64 or 128", "16"),
    (("quantize", *ALL), "group_size", lambda t: 0, "group_size must be 32, 64 or 128", "0"),
    (("quantize", *ALL), "group_size", lambda t: -64, "group_size must be 32, 64 or 128", "-64"),
    (("quantize", *ALL), "group_size", lambda t: 2**62, "group_size must be", str(2**62)),
    (("quantize",), "w", lambda t: t.int(), "w must be float32, float16, bfloat16", "Int"),
    (("quantize",), "w", lambda t: t[0, 0], "w must have at least 1 dimension", "0"),
    (("quantize",), "w", lambda t: t[:, :96], "w must have a last dimension that is", "96"),
    (ALL, "packed", lambda t: t.long(), "packed must be int32 or uint32", "Long"),
    (ALL, "packed", lambda t: t.float(), "packed must be int32 or uint32", "Float"),
    (ALL, "packed", lambda t: t[..., :3], "packed must have a last dimension of whole", "3"),
    (("dequantize",), "packed", lambda t: t[0, 0], "packed must have at least 1 dim", "0"),
    (("embedding", *PRODUCTS), "packed", lambda t: t.flatten(), "packed must have at least 2", "1"),
    (("embedding",), "packed", lambda t: t[None], "packed must have 2 dimensions", "3"),
    (WEIGHT_OPS, "scales", lambda t: t.int(), "scales must be float32, float16", "Int"),
    (WEIGHT_OPS, "scales", lambda t: t[..., :1], "scales must have shape", "1]"),
    (WEIGHT_OPS, "scales", lambda t: t[..., :4, :], "scales must have shape", "2]"),
    (WEIGHT_OPS, "scales", lambda t: t.flatten(), "scales must have shape", "]"),
    (WEIGHT_OPS, "biases", lambda t: t[..., :5, :], "biases must have shape", "2]"),
    (WEIGHT_OPS, "biases", lambda t: t.half(), "biases must have the dtype of scales", "Half"),
    (PRODUCTS, "x", lambda t: t.int(), "x must be float32, float16, bfloat16", "Int"),
    (PRODUCTS, "x", lambda t: t[..., :64], "x must have a last dimension of 128", "64"),
    (("qmm",), "x", lambda t: t[0, 0], "x must have at least 1 dimension", "0"),
    (("gather_qmm",), "x", lambda t: t[0, 0], "x must have at least 2 dimensions", "1"),
    (("embedding",), "indices", lambda t: t.float(), "indices must be int32 or int64", "Float"),
    (("embedding",), "indices", lambda t: t.bool(), "indices must be int32 or int64", "Bool"),
    (
        ("gather_qmm", "affine_grad"),
        "rhs_indices",
        lambda t: t.float(),
        "rhs_indices must be",
        "Float",
    ),
    (("gather_qmm",), "rhs_indices", lambda t: t[:2], "rhs_indices must broadcast", "[2]"),
    (("affine_grad",), "grad", lambda t: t.half(), "grad must have the dtype of x", "Half"),
    (("affine_grad",), "grad", lambda t: t[..., :5], "grad must have shape", "5]"),
]
ROWS = [(op, *rest) for ops_of_rule, *rest in RULES for op in ops_of_rule]
IDS = [f"{op}-{rest[0]}-{rest[2]}-{rest[3]}" for op, *rest in ROWS]


@pytest.mark.parametrize("op, argument, spoil, start, value", ROWS, ids=IDS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_illegal_call_names_argument_rule_and_value(op, argument, spoil, start, value, device):
    arguments = valid(op)
    getattr(ops, op)(**arguments)  # legal until spoiled
    arguments[argument] = spoil(arguments[argument])
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError) as error:
        getattr(ops, op)(**moved)
    message = str(error.value).splitlines()[0]
    assert message.startswith(start)
    assert message.endswith(f", got {value}") or value == "]" or value.endswith("]")
    assert message.endswith(value)


def test_packed_must_broadcast_against_x():
    packed, scales, biases = make_weights(3, 6, 64, group_size=64)
    with pytest.raises(ValueError, match=r"packed must broadcast against \[2\], got \[3\]"):
        ops.qmm(torch.randn(2, 4, 64), packed, scales, biases, 64)


DEVICE_ROWS = [
    ("qmm", "packed"),
    ("qmm", "scales"),
    ("qmm", "biases"),
    ("dequantize", "scales"),
    ("embedding", "indices"),
    ("gather_qmm", "rhs_indices"),
    ("affine_grad", "grad"),
]


@pytest.mark.parametrize("op, argument", DEVICE_ROWS)
def test_tensors_must_share_a_device(op, argument):
    arguments = valid(op)
    arguments[argument] = arguments[argument].to("meta")
    with pytest.raises(ValueError, match=r"must be on (cpu|meta) as the others, got (cpu|meta)"):
        getattr(ops, op)(**arguments)


OUT_OF_RANGE = [
    ("embedding", "indices", [0, 6], r"indices must be in \[0, 6\), got 6"),
    ("embedding", "indices", [-1, 0], r"indices must be in \[0, 6\), got -1"),
    ("embedding", "indices", [2**62, 0], rf"indices must be in \[0, 6\), got {2**62}"),
    ("gather_qmm", "rhs_indices", [0, 2, 1], r"rhs_indices must be in \[0, 2\), got 2"),
    ("gather_qmm", "lhs_indices", [0, -3, 1], r"lhs_indices must be in \[0, 3\), got -3"),
    ("affine_grad", "rhs_indices", [0, 9, 1], r"rhs_indices must be in \[0, 2\), got 9"),
]


@pytest.mark.parametrize("op, argument, values, message", OUT_OF_RANGE)
def test_index_out_of_range(op, argument, values, message):
    # On the CPU: a GPU would have to be waited for, and writes NaN instead.
    arguments = {**valid(op), argument: torch.tensor(values)}
    with pytest.raises(IndexError, match=message):
        getattr(ops, op)(**arguments)


def test_index_into_no_rows():
    packed, scales, biases = make_weights(0, 128)
    with pytest.raises(IndexError, match=r"indices must be in \[0, 0\), got 0"):
        ops.embedding(torch.tensor([0]), packed, scales, biases, 128)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sizes_beyond_int32_do_not_overflow(device):
    """A result of 2**62 bytes is refused by the allocator, not computed with wrapped sizes."""
    x = torch.empty(1, 32, device=device).expand(2**30, 32)
    packed = torch.zeros(1, 1, dtype=torch.int32, device=device).expand(2**30, 1)
    scales = torch.zeros(1, 1, device=device).expand(2**30, 1)
    if device == "meta":
        assert ops.qmm(x, packed, scales, None, 32).shape == (2**30, 2**30)
    else:
        with pytest.raises(RuntimeError, match=r"memory|allocate"):
            ops.qmm(x, packed, scales, None, 32)


def freed(t: torch.Tensor) -> torch.Tensor:
    """As FSDP leaves a parameter between uses."""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def cut_short(t: torch.Tensor) -> torch.Tensor:
    """The last byte of a view has gone."""
    t = torch.cat([t, t])[: len(t)]
    t.untyped_storage().resize_(t.nbytes - 1)
    return t


# how a tensor is no plain tensor any more, which error, how it reads after the name
NOT_PLAIN = {
    "None": (lambda t: None, TypeError, "must be a tensor, got None"),
    "sparse": (lambda t: t.to_sparse(), ValueError, "must be a dense tensor, got layout Sparse"),
    "mkldnn": (lambda t: t.to_mkldnn(), ValueError, "must be a dense tensor, got layout Mkldnn"),
    "freed": (freed, ValueError, r"must lie within its storage \(0 bytes\), got strides"),
    "cut short": (cut_short, ValueError, r"must lie within its storage \(\d+ bytes\), got strides"),
}
ARGUMENTS = [
    (op, name)
    for op in ("quantize", *ALL, *LINEAR, *LEVEL_OPS)
    for name, value in valid(op).items()
    if isinstance(value, torch.Tensor)
]


def schema_type(op: str, argument: str):
    schema = getattr(ops, op).default._schema
    return next(a.type for a in schema.arguments if a.name == argument)


@pytest.mark.parametrize(
    "op, argument, run",
    [
        (*row, run)
        for row in ARGUMENTS
        for run in ("kernels", "autocast", "composite")
        if run != "composite" or not row[0].startswith("linear")  # which have none
    ],
)
def test_tensors_that_are_not_plain_are_refused(op, argument, run):
    for name, (spoil, error, message) in NOT_PLAIN.items():
        arguments = valid(op)
        t = arguments[argument]
        optional = "Optional" in str(schema_type(op, argument))
        if name == "None" and optional:
            continue
        if name == "mkldnn" and t.dtype != torch.float32:
            continue
        arguments[argument] = spoil(t)
        overload = getattr(ops, op).default
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=run == "autocast"),
            pytest.raises(error, match=f"^{argument} {message}"),
        ):
            if run == "composite":
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
                overload.redispatch(keys, **arguments)
            else:
                overload(**arguments)


def test_complex_values_are_refused():
    arguments = valid("qmm")
    arguments["x"] = arguments["x"].to(torch.complex64)
    with pytest.raises(ValueError, match=r"x must be float32, float16, .* or float64, got Complex"):
        ops.qmm(**arguments)


@pytest.mark.parametrize("name", ["avx9", "", "SCALAR"])
def test_unknown_instruction_set_is_an_error(name):
    with pytest.raises(ValueError, match="name must be one of"):
        ops.set_cpu_isa(name)
