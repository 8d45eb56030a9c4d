"""Operators as csrc/cuda calls its kernels: plan, arguments, launches; all on the emulator."""

from dataclasses import dataclass, field

import numpy as np
import plans
import torch
from emulated import Map, launch
from torch import Tensor

NAMES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}


def raw(t: Tensor | None) -> np.ndarray | None:
    """The same memory."""
    if t is None:
        return None
    return (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy()


@dataclass
class Options:
    """How launches run: with a change in a source, in an order of threads."""

    changes: dict = field(default_factory=dict)
    schedule: int = 0
    seed: int = 1

    def launch(self, plan: plans.Launch, **arguments) -> None:
        launch(plan, changes=self.changes, schedule=self.schedule, seed=self.seed, **arguments)


def product(x, packed, scales, biases, group_size, gpu=plans.H100, run=None) -> Tensor:
    """qmm of one matrix, by the way that the plan for `gpu` takes."""
    run = run or Options()
    (m, k), n = x.shape, packed.shape[0]
    plan = plans.product(
        m, n, k, gpu=gpu, group_size=group_size, x=NAMES[x.dtype], levels=NAMES[scales.dtype],
        biases=biases is not None,
    )  # fmt: skip
    weights = {"packed": raw(packed), "scales": raw(scales), "biases": raw(biases)}
    numbers = {"m": m, "n": n, "k": k}
    y = torch.empty(m, n, dtype=x.dtype)
    ways = {"b1": _b1, "hmma": _hmma, "tiles": _tiles, "wgmma": _wgmma}
    ways[plan.way](plan, run, x, weights, numbers, group_size, y)
    return y


def _hmma(plan, run, x, weights, numbers, group_size, y):
    inputs = {"x": raw(x), **weights}
    run.launch(plan.launches[0], inputs=inputs, outputs={"y": raw(y)}, numbers=numbers, late=("x",))


def _b1(plan, run, x, weights, numbers, group_size, y):
    items, octets = numbers["k"] // 128 * numbers["m"], 4 if x.dtype == torch.float32 else 2
    planes = np.zeros((items, octets, 32), np.uint32)
    groups = np.zeros((items, 128 // group_size, 4), np.float32)
    made = {"planes": planes, "groups": groups}
    inputs = {"x": raw(x), **weights}
    run.launch(plan.launches[0], inputs=inputs, outputs=made, numbers=numbers, late=("x",))
    inputs, late = {**inputs, **made}, ("x", *made)
    run.launch(plan.launches[1], inputs=inputs, outputs={"y": raw(y)}, numbers=numbers, late=late)


def _sum_up(plan, run, to, y, launch_product):
    """A product into y, or into partial sums and from there."""
    if plan.splits == 1:
        return launch_product(to)
    partial = np.zeros((plan.splits, y.numel()), np.float32)
    launch_product(partial)
    numbers = {"count": y.numel(), "splits": plan.splits}
    add = plans.rows("sum_partials", y.numel(), other=NAMES[y.dtype])
    run.launch(
        add, inputs={"partial": partial}, outputs={"y": to}, numbers=numbers, late=("partial",)
    )


def _tiles(plan, run, x, weights, numbers, group_size, y):
    def launch_product(to):
        run.launch(
            plan.launches[0],
            inputs={"x": raw(x), **weights},
            outputs={"y": to},
            numbers={**numbers, "steps": plan.stages},
            late=("x",),
        )

    _sum_up(plan, run, raw(y), y, launch_product)


def _wgmma(plan, run, x, weights, numbers, group_size, y):
    (product,), (m, n, k) = plan.launches, numbers.values()
    rows, steps, consumers = (int(product.define(d)) for d in ("ROWS", "STEPS", "CONSUMERS"))
    values, parts, sums, sum_rows = raw(x), 1, None, -(-m // rows) * rows
    if x.dtype == torch.float32:
        parts = 3
        values = np.zeros((3, m, k), np.uint16)
        sums = np.zeros((2, k // group_size, sum_rows), np.float32)
        run.launch(
            plans.rows("split", m, columns=k, group_size=group_size, matrices=sum_rows),
            inputs={"x": raw(x)},
            outputs={"parts": values, "sums": sums},
            numbers={"m": m, "k": k, "sum_rows": sum_rows},
        )
    x_map = Map(
        values, (64, m, k // 64, parts), (2 * k, 128, 2 * k * m), (64, rows, 2 * steps, parts), 128
    )
    words = weights["packed"].view(np.uint32)
    box = (4 * steps, 64 * consumers)
    inputs = {
        "x": x_map,
        "words": Map(words, (k // 32, n), (k // 8,), box, 64 if steps == 4 else 0),
        "scales": weights["scales"],
        "biases": weights["biases"],
        "sums": sums,
    }
    late = ("x",) if sums is None else ("x", "sums")

    def launch_product(to):
        run.launch(
            product,
            inputs=inputs,
            outputs={"y": to},
            numbers={**numbers, "steps": plan.stages, "sum_rows": sum_rows},
            late=late,
        )

    _sum_up(plan, run, raw(y), y, launch_product)


def gathered(x, packed, scales, biases, x_index, w_index, group_size, transpose, run=None):
    """gather_qmm: `x_index[b]` meets `w_index[b]`."""
    run = run or Options()
    (_, m, k), batches = x.shape, len(x_index)
    n = packed.shape[1] if transpose else packed.shape[2] * 32
    plan = plans.product(
        m, n, k, group_size=group_size, transpose=transpose, batches=batches, indexed=True,
        x=NAMES[x.dtype], levels=NAMES[scales.dtype], biases=biases is not None,
    )  # fmt: skip
    assert plan.way == ("hmma" if transpose else "gather_n")
    y = torch.empty(batches, m, n, dtype=x.dtype)
    run.launch(
        plan.launches[0],
        inputs={
            **{"x": raw(x), "packed": raw(packed), "scales": raw(scales), "biases": raw(biases)},
            **{"x_index": raw(x_index), "w_index": raw(w_index)},
        },
        outputs={"y": raw(y)},
        numbers={"x_matrices": len(x), "w_matrices": len(packed), "m": m, "n": n, "k": k},
        late=("x",) if plan.launches[0].early else (),
    )
    return y


def quantize(w, group_size, run=None):
    groups = w.numel() // group_size
    packed = torch.empty(w.numel() // 32, dtype=torch.int32)
    scales, biases = torch.empty(2, groups, dtype=w.dtype)
    (run or Options()).launch(
        plans.rows("quantize", groups, x=NAMES[w.dtype], group_size=group_size),
        inputs={"w": raw(w)},
        outputs={"packed": raw(packed), "scales": raw(scales), "biases": raw(biases)},
        numbers={"groups": groups},
    )
    shape = (*w.shape[:-1], -1)
    return packed.view(shape), scales.view(shape), biases.view(shape)


def decode(packed, scales, biases, group_size, indices=None, dtype=None, run=None):
    """dequantize, or embedding with indices."""
    dtype = dtype or scales.dtype
    words = packed.numel() if indices is None else packed.shape[1]
    rows = 1 if indices is None else len(indices)
    plan = plans.rows(
        "decode", words * 32 // group_size, other=NAMES[dtype], levels=NAMES[scales.dtype],
        group_size=group_size, biases=biases is not None, matrices=rows,
    )  # fmt: skip
    out = torch.empty(rows, words * 32, dtype=dtype)
    run = run or Options()
    run.launch(
        plan,
        inputs={
            **{"packed": raw(packed), "scales": raw(scales), "biases": raw(biases)},
            "indices": raw(indices),
        },
        outputs={"out": raw(out)},
        numbers={
            "rows": 1 if indices is None else len(packed),
            "words": words,
            "blocks_per_row": plan.grid[0] // rows,
        },
    )
    return out if indices is not None else out.view(len(packed), -1)


def affine_grad(grad, x, packed, group_size, transpose=True, run=None):
    """Of one matrix: float32 gradients of scales and biases."""
    rows, columns = packed.shape[0], packed.shape[1] * 32
    shape = (rows, columns // group_size)
    grad_scales, grad_biases = torch.empty(2, *shape)
    (run or Options()).launch(
        plans.rows("affine_grad", rows, x=NAMES[x.dtype], group_size=group_size, columns=columns),
        inputs={"grad": raw(grad), "x": raw(x), "packed": raw(packed)},
        outputs={"grad_scales": raw(grad_scales), "grad_biases": raw(grad_biases)},
        numbers={
            **{"x_matrices": 1, "batches": 1, "m": len(x), "rows": rows, "columns": columns},
            "x_by_row": not transpose,
        },
    )
    return grad_scales, grad_biases


def on_groups(
    kernel, w, group_size, outputs, *, rule="minmax", grad=None, levels=None, importance=None,
    other=None, run=None,
):  # fmt: skip
    """A kernel of levels.cu, which fills `outputs`: packed, out, first, second."""
    rules = ("minmax", "sign", "mean", "optimal")
    groups = w.numel() // group_size
    given = dict(zip(("scales", "biases"), map(raw, levels or ()), strict=False))
    (run or Options()).launch(
        plans.rows(
            kernel, groups, x=NAMES[w.dtype], other=NAMES[other or w.dtype],
            levels=NAMES[levels[0].dtype] if levels else "float", group_size=group_size,
            rule=rules.index(rule), importance=importance is not None,
        ),
        inputs={"w": raw(w), "grad": raw(grad), "importance": raw(importance), **given},
        outputs={name: raw(t) for name, t in outputs.items()},
        numbers={
            "groups": groups,
            "period": 1 if importance is None else importance.numel() // group_size,
        },
    )  # fmt: skip


def flip_bits(bits, error, scales, moments, begin, end, group_size, run=None):
    """One pass over a block of columns: changes, in place of bits; what is left of the error."""
    rows, columns = bits.shape
    local, changes = error[:, begin:end].clone(), torch.empty(rows, end - begin)
    (run or Options()).launch(
        plans.rows("flip_bits", rows, group_size=group_size),
        inputs={"scales": raw(scales), "moments": raw(moments)},
        outputs={"changes": raw(changes)},
        updates={"bits": raw(bits), "error": raw(local)},
        numbers={"rows": rows, "columns": columns, "begin": begin, "width": end - begin},
    )
    return changes, local
