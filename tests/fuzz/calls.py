"""Random legal calls of every operator, on every instruction set, against float64.

Errors are bounded value by value from the sums of magnitudes, so a bound holds for any input and
a wrong index, stride or tail breaks it; how near to the best accuracy results are is another
question.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import reference
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fuzz.levels import CALLS as LEVEL_CALLS
from fuzz.tensors import FLOATS, GROUP_SIZES, layout, numbers, poisoned, unpacked, weights

ops = torch.ops.onebit
ISAS = ops.cpu_isas()

Check = Callable[[Any], None]


def case(number: int) -> int:
    choose = random.Random(number)
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes a millisecond
    op = choose.choice(list(CALLS))
    arguments, check = CALLS[op](choose)
    run = getattr(ops, op)
    before = {
        k: v.clone(memory_format=torch.contiguous_format)
        for k, v in arguments.items()
        if isinstance(v, Tensor)
    }
    isas = ISAS if choose.random() < 0.9 else ISAS[-1:]
    for isa in isas:
        ops.set_cpu_isa(isa)
        result = run(**arguments)
        try:
            check(result)
        except AssertionError as error:
            raise AssertionError(f"{op} on {isa} of {described(arguments)}") from error
        if op not in ("flip_bits_", "descend_"):  # which write
            again = run(**{**arguments, **before})
            for a, b in zip(as_tuple(result), as_tuple(again), strict=True):
                same = torch.equal(bits_of(a), bits_of(b))
                assert same, f"{op} on {isa} depends on the strides of {described(arguments)}"
    calls = 2 * len(isas)
    if op not in ("flip_bits_", "descend_"):
        for name, t in before.items():
            assert torch.equal(bits_of(arguments[name]), bits_of(t)), f"{op} wrote to {name}"
    if choose.random() < 0.1:
        check_meta(op, arguments, result)
        calls += 1
    if op in ("qmm", "gather_qmm", "linear") and choose.random() < 0.2:
        check_gradients(choose, op, arguments)
        calls += 2
    return calls


def described(arguments: dict) -> dict:
    return tree_map_only(Tensor, lambda t: (tuple(t.shape), t.stride(), t.dtype), arguments)


def bits_of(t: Tensor) -> Tensor:
    """A view that compares equal where bits are: NaN as well."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.contiguous().view(kinds[t.element_size()]) if t.is_floating_point() else t.clone()


def check_meta(op: str, arguments: dict, result: Any) -> None:
    moved = tree_map_only(Tensor, lambda t: t.to("meta"), arguments)
    got = getattr(ops, op)(**moved)
    for a, b in zip(as_tuple(got), as_tuple(result), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{op}: meta {a.shape} {a.dtype}"


def as_tuple(result: Any) -> tuple:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


# Products
# --------------------------------------------------------------------------------------------------


def exact(packed: Tensor, scales: Tensor, biases: Tensor | None, group_size: int) -> Tensor:
    """scale * bit + bias in float64."""
    scales = scales.double()
    biases = -scales / 2 if biases is None else biases.double()
    bits = unpacked(packed).double().unflatten(-1, (scales.shape[-1], group_size))
    return (bits * scales.unsqueeze(-1) + biases.unsqueeze(-1)).flatten(-2)


def magnitude(packed: Tensor, scales: Tensor, biases: Tensor | None, group_size: int) -> Tensor:
    """What weights are made of: |scale| + |bias|, which may cancel in them."""
    size = scales.double().abs()
    size = size + (size / 2 if biases is None else biases.double().abs())
    return size.repeat_interleave(group_size, -1)


def rounding(dtype: torch.dtype, terms: int) -> float:
    """The relative error that sums of so many products may have, in units of their magnitudes."""
    sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    stored = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0.0
    return sums * (16 + terms / 4) + stored


def expect_near(got: Tensor, want: Tensor, mass: Tensor, dtype: torch.dtype, terms: int) -> None:
    """got is want, float64, but for sums of terms of magnitude mass and one rounding to dtype."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if not want.numel():
        return
    info = torch.finfo(got.dtype)
    bound = mass * rounding(dtype, terms) + want.abs() * info.eps
    bound = bound + info.smallest_normal * info.eps * (2 + terms)  # where numbers are subnormal
    excess = (got.detach().double() - want).abs_().sub_(bound)
    if not excess.isfinite().all():  # rarely: what float64 or the dtype cannot hold
        finite = want.isfinite()
        assert not got[~finite].isfinite().any(), "finite where float64 is not"
        excess = excess[finite & (want.abs() + bound < info.max)]
        assert not excess.isnan().any(), "NaN where float64 is finite"
    worst = float(excess.max()) if excess.numel() else 0.0
    assert worst <= 0, f"{worst} beyond the bound"


def product_of(arguments: dict, w: Tensor, x: Tensor) -> Tensor:
    w = w.mT if arguments.get("transpose", True) else w
    if "rhs_indices" not in arguments:
        return x @ w
    lhs, rhs = arguments["lhs_indices"], arguments["rhs_indices"]
    count = lambda t: torch.arange(t.shape[:-2].numel()).view(t.shape[:-2])
    matrices = lambda t: t.reshape(t.shape[:-2].numel(), *t.shape[-2:])
    lhs = count(x) if lhs is None else lhs.long()
    rhs = count(w) if rhs is None else rhs.long()
    lhs, rhs = torch.broadcast_tensors(lhs, rhs)
    return matrices(x)[lhs] @ matrices(w)[rhs]


WEIGHT_NAMES = ("packed", "scales", "biases", "group_size")


def product_check(arguments: dict) -> Check:
    """A check of the product without a bias."""
    x = arguments["x"]
    levels = [arguments[name] for name in WEIGHT_NAMES]
    want = product_of(arguments, exact(*levels), x.double())
    mass = product_of(arguments, magnitude(*levels), x.double().abs())
    bias = arguments.get("bias")
    if bias is not None:
        mass = mass + want.abs() + bias.double().abs()
        want = want + bias.double()
    scales = arguments["scales"]
    # Infinities of x come out as they do in float64; those of levels only as something not finite.
    as_ieee = scales.dtype != torch.float64 and bool(scales.isfinite().all())

    def check(y: Tensor) -> None:
        expect_near(y, want, mass, x.dtype, x.shape[-1])
        if as_ieee:
            odd = ~want.isfinite()
            same_values(want[odd])(y[odd].double())

    return check


def sizes(choose: random.Random) -> tuple[int, int]:
    """rows and groups of a matrix: mostly small, sometimes none or beyond a tile."""
    rows = choose.choice([0, 1, 2, 3, 5, 8, 17, 31, 33, 64, 65, 70])
    return rows, choose.choice([0, 1, 1, 2, 3, 5])


def qmm(choose: random.Random) -> tuple[dict, Check]:
    group_size, transpose = choose.choice(GROUP_SIZES), choose.random() < 0.6
    rows, groups = sizes(choose)
    lead = choose.choice([(), (), (), (2,), (1,), (3, 1), (0,)])
    packed, scales, biases = weights(choose, group_size, *lead, rows=rows, groups=groups)
    k = groups * group_size if transpose else rows
    batch = choose.choice([(), (2,), (1,), (3, 2)]) if lead in ((), (1,)) else lead
    m = () if choose.random() < 0.15 and not batch else (choose.choice([0, 1, 1, 2, 4, 5, 9, 33]),)
    x = numbers(choose, *batch, *m, k).to(choose.choice(FLOATS))
    arguments = {
        "x": poisoned(choose, layout(choose, x)),
        "packed": packed,
        "scales": poisoned(choose, scales),
        "biases": biases,
        "group_size": group_size,
        "transpose": transpose,
    }
    if lead and not m:  # one row: matmul of a vector
        arguments["x"] = arguments["x"].clone()
    return arguments, product_check(arguments)


def gather_qmm(choose: random.Random) -> tuple[dict, Check]:
    group_size, transpose = choose.choice(GROUP_SIZES), choose.random() < 0.6
    rows, groups = sizes(choose)
    matrices, inputs = choose.choice([1, 2, 3]), choose.choice([1, 2, 4])
    packed, scales, biases = weights(choose, group_size, matrices, rows=rows, groups=groups)
    k = groups * group_size if transpose else rows
    x = numbers(choose, inputs, choose.choice([1, 1, 2, 5]), k).to(choose.choice(FLOATS))
    batch = choose.choice([(0,), (1,), (5,), (2, 3)])

    def index(count: int, shape: tuple[int, ...]) -> Tensor:
        dtype = choose.choice([torch.int32, torch.int64])
        return layout(choose, torch.randint(0, count, shape, dtype=dtype))

    lhs = index(inputs, batch) if inputs != matrices or choose.random() < 0.7 else None
    rhs = index(matrices, batch if lhs is not None else (matrices,))
    if lhs is not None and choose.random() < 0.2:
        rhs = index(matrices, (1,))
    arguments = {
        "x": poisoned(choose, layout(choose, x)),
        "packed": packed,
        "scales": scales,
        "biases": biases,
        "lhs_indices": lhs,
        "rhs_indices": rhs,
        "group_size": group_size,
        "transpose": transpose,
    }
    return arguments, product_check(arguments)


def linear(choose: random.Random) -> tuple[dict, Check]:
    arguments, _ = qmm(choose)
    del arguments["transpose"]
    packed, group_size = arguments["packed"], arguments["group_size"]
    if packed.dim() != 2:
        packed = torch.zeros(3, group_size // 32, dtype=torch.int32)
        levels = [torch.randn(3, 1) for _ in range(2)]
        arguments |= {"packed": packed, "scales": levels[0], "biases": levels[1]}
    rows, k = packed.shape[0], packed.shape[1] * 32
    x = numbers(choose, choose.choice([1, 1, 2, 4, 5, 9]), k).to(choose.choice(FLOATS))
    bias = numbers(choose, rows).to(choose.choice(FLOATS)) if choose.random() < 0.6 else None
    arguments |= {"x": layout(choose, x), "bias": bias, "group_size": group_size}
    return arguments, product_check(arguments)


def prepackable(choose: random.Random) -> dict:
    """Arguments of linear with levels that can be prepacked."""
    arguments, _ = linear(choose)
    for name in ("scales", "biases"):
        if arguments[name] is not None and arguments[name].dtype == torch.float64:
            arguments[name] = arguments[name].float()
    return arguments


def linear_prepacked(choose: random.Random) -> tuple[dict, Check]:
    """As linear, with the weights in the order of kernels; on tables without one too."""
    arguments = prepackable(choose)
    check, weights = product_check(arguments), [arguments.pop(name) for name in WEIGHT_NAMES]
    packed, scales, biases, group_size = weights
    form = {"rows": packed.shape[0], "columns": packed.shape[1] * 32, "group_size": group_size}
    form |= {"dtype": scales.dtype, "symmetric": biases is None}
    return {**arguments, "prepacked": ops.prepack(*weights), **form}, check


def qmm_prepacked_each(choose: random.Random) -> tuple[dict, Check]:
    """As linear_prepacked, two or three matrices: the first some rows of it, the others all."""
    arguments = prepackable(choose) | {"bias": None}
    rows = [choose.randint(0, arguments["packed"].shape[0])]
    rows += [arguments["packed"].shape[0]] * choose.choice([1, 2])
    each = []
    for n in rows:
        levels = {
            k: arguments[k] if arguments[k] is None else arguments[k][:n] for k in WEIGHT_NAMES[:3]
        }
        each.append(arguments | levels)
    checks = [product_check(one) for one in each]
    prepacked = [ops.prepack(*(one[name] for name in WEIGHT_NAMES)) for one in each]
    form = {"columns": arguments["packed"].shape[1] * 32, "group_size": arguments["group_size"]}
    form |= {"dtype": arguments["scales"].dtype, "symmetric": arguments["biases"] is None}

    def check(results: tuple[Tensor, Tensor, Tensor]) -> None:
        for one, y in zip(checks, results, strict=False):
            one(y)

    return {"x": arguments["x"], "prepacked": prepacked, "rows": rows, **form}, check


def affine_grad(choose: random.Random) -> tuple[dict, Check]:
    arguments, _ = (qmm if choose.random() < 0.5 else gather_qmm)(choose)
    x = arguments["x"] = layout(choose, numbers(choose, *arguments["x"].shape)).to(
        arguments["x"].dtype
    )
    scales = torch.zeros(arguments.pop("scales").shape, dtype=torch.float64)
    arguments.pop("biases")
    levels = (arguments["packed"], scales, scales, arguments["group_size"])
    shape = product_of(arguments, exact(*levels), x.double()).shape
    grad = layout(choose, numbers(choose, *shape).to(x.dtype))
    arguments = {"grad": grad, **arguments, "lhs_indices": arguments.get("lhs_indices")}
    arguments["rhs_indices"] = arguments.get("rhs_indices")
    if arguments["lhs_indices"] is None and arguments["rhs_indices"] is None:
        plain = {k: v for k, v in arguments.items() if not k.endswith("indices")}
    else:
        plain = arguments
    want = level_gradients(plain, scales, x.double(), grad.double())
    mass = level_gradients(plain, scales, x.double().abs(), grad.double().abs())
    rows = max(1, grad.numel() // max(1, grad.shape[-1]))
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    # In float64 one value is added after the other: sums of one sign round as often, alike.
    size = arguments["group_size"]
    terms = rows * size if sums == torch.float64 else rows + size

    def check(result: tuple[Tensor, Tensor]) -> None:
        for got, w, m in zip(result, want, mass, strict=True):
            assert got.dtype == sums
            expect_near(got, w, m, sums, terms)

    return arguments, check


def level_gradients(arguments: dict, zeros: Tensor, x: Tensor, grad: Tensor) -> list[Tensor]:
    scales, biases = zeros.clone().requires_grad_(), zeros.clone().requires_grad_()
    w = exact(arguments["packed"], scales, biases, arguments["group_size"])
    y = product_of(arguments, w, x)
    got = torch.autograd.grad(y, (scales, biases), grad, allow_unused=True)
    return [torch.zeros_like(zeros) if g is None else g for g in got]


def check_gradients(choose: random.Random, op: str, arguments: dict) -> None:
    """The gradients of x, scales and biases, those of float64 matmul."""
    names = [n for n in ("x", "scales", "biases") if arguments[n] is not None]
    leaves = {n: arguments[n].detach().nan_to_num(0.5, 2.0, -2.0).requires_grad_() for n in names}
    y = getattr(ops, op)(**{**arguments, **leaves})
    grad = numbers(choose, *y.shape).to(y.dtype)
    got = torch.autograd.grad(y, list(leaves.values()), grad)

    def plain(map_tensor: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        own = {n: map_tensor(t.detach().double()).requires_grad_() for n, t in leaves.items()}
        half = map_tensor(torch.tensor(-0.5, dtype=torch.float64))
        biases = own.get("biases", own["scales"] * half)
        w = exact(arguments["packed"], own["scales"], biases, arguments["group_size"])
        return torch.autograd.grad(
            product_of(arguments, w, own["x"]), list(own.values()), map_tensor(grad.double())
        )

    want, mass = plain(lambda t: t), plain(Tensor.abs)
    terms = y.numel() + arguments["packed"].shape[-1] * 32
    for name, g, w, m in zip(names, got, want, mass, strict=True):
        assert g.dtype == leaves[name].dtype
        dtype = g.dtype if name == "x" else arguments["x"].dtype
        try:
            expect_near(g, w, m, dtype, terms)
        except AssertionError as error:
            what = f"gradient of {name}, {op} of {described(arguments)}"
            raise AssertionError(what) from error


# The codec
# --------------------------------------------------------------------------------------------------


def quantize(choose: random.Random) -> tuple[dict, Check]:
    group_size = choose.choice(GROUP_SIZES)
    shape = choose.choice([(), (0,), (1,), (3,), (2, 3), (17,)])
    w = numbers(choose, *shape, choose.choice([0, 1, 2, 3]) * group_size)
    w = poisoned(choose, layout(choose, w.to(choose.choice(FLOATS))))

    def check(result: tuple[Tensor, Tensor, Tensor]) -> None:
        packed, scales, biases = result
        real = np.float64 if w.dtype == torch.float64 else np.float32
        values = w.to(torch.float64 if real is np.float64 else torch.float32)
        groups = values.unflatten(-1, (w.shape[-1] // group_size, group_size)).numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            low = np.where(np.isnan(groups), np.inf, groups).min(-1, initial=np.inf)
            high = np.where(np.isnan(groups), -np.inf, groups).max(-1, initial=-np.inf)
            scale = (high - low).astype(real)
            least = real(np.float32(1e-7))
            scale = np.where(scale < least, least, scale)
            bits = (groups - low[..., None]).astype(real) > (real(0.5) * scale)[..., None]
        bits = bits.reshape(w.shape)
        assert np.array_equal(reference.unpack(packed.numpy().view(np.uint32)), bits), "packed"
        for got, expected in ((scales, scale), (biases, low)):
            expected = torch.from_numpy(np.ascontiguousarray(expected, dtype=real)).to(w.dtype)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)

    return {"w": w, "group_size": group_size}, check


def decoded(packed: Tensor, scales: Tensor, biases: Tensor | None, group_size: int) -> Tensor:
    """round(round(bit * scale) + bias) by plain torch."""
    bits = unpacked(packed).to(scales.dtype).unflatten(-1, (scales.shape[-1], group_size))
    biases = scales * -0.5 if biases is None else biases
    return (bits * scales.unsqueeze(-1) + biases.unsqueeze(-1)).flatten(-2)


def same_values(want: Tensor) -> Check:
    return lambda got: torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def dequantize(choose: random.Random) -> tuple[dict, Check]:
    group_size, (rows, groups) = choose.choice(GROUP_SIZES), sizes(choose)
    lead = choose.choice([(), (2,), (0,), (2, 2)])
    packed, scales, biases = weights(choose, group_size, *lead, rows=rows, groups=groups)
    names = {"packed": packed, "scales": poisoned(choose, scales), "biases": biases}
    return {**names, "group_size": group_size}, same_values(
        decoded(packed, names["scales"], biases, group_size)
    )


def embedding(choose: random.Random) -> tuple[dict, Check]:
    arguments, _ = dequantize(choose)
    while arguments["packed"].dim() != 2 or not arguments["packed"].shape[0]:
        arguments, _ = dequantize(choose)
    rows = arguments["packed"].shape[0]
    shape = choose.choice([(), (0,), (5,), (2, 3)])
    dtype = choose.choice([torch.int32, torch.int64])
    indices = layout(choose, torch.randint(0, rows, shape, dtype=dtype))
    return {"indices": indices, **arguments}, same_values(
        decoded(*(arguments[name] for name in WEIGHT_NAMES))[indices.long()]
    )


CALLS: dict[str, Callable[[random.Random], tuple[dict, Check]]] = {
    "qmm": qmm,
    "gather_qmm": gather_qmm,
    "linear": linear,
    "linear_prepacked": linear_prepacked,
    "qmm_prepacked_each": qmm_prepacked_each,
    "affine_grad": affine_grad,
    "quantize": quantize,
    "dequantize": dequantize,
    "embedding": embedding,
    **LEVEL_CALLS,
}
