"""What the products cost, for ``torch.utils.flop_counter``: what dense ones do."""

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def _product(x: Any, packed: Any, *rest: Any, transpose: bool = True, **keywords: Any) -> int:
    """x ``[..., k]`` times packed ``[..., n, k // 32]``, or ``[..., k, n // 32]``."""
    if len(rest) > 3:
        transpose = rest[3]
    *rows, k = x
    n = packed[-2] if transpose else packed[-1] * 32
    lead = max(prod(rows[:-1]), prod(packed[:-2])) * (rows[-1] if rows else 1)
    return 2 * lead * k * n


def _prepacked(x: Any, prepacked: Any, n: int, *rest: Any, **keywords: Any) -> int:
    return 2 * prod(x) * n


def _prepacked_each(x: Any, prepacked: Any, rows: list[int], *rest: Any, **keywords: Any) -> int:
    return 2 * prod(x) * sum(rows)


def _gathered(x: Any, packed: Any, *rest: Any, out_shape: Any, **keywords: Any) -> int:
    *batch, m, n = out_shape
    return 2 * prod(batch) * m * n * x[-1]


def _affine_grad(grad: Any, x: Any, *rest: Any, **keywords: Any) -> int:
    return 2 * prod(grad) * x[-1]


def register() -> None:
    """Have FlopCounterMode count the products of packed weights."""
    ops = torch.ops.onebit
    formulas = {
        ops.qmm: _product,
        ops.qmm_prepacked: _prepacked,
        ops.qmm_prepacked_each: _prepacked_each,
        ops.gather_qmm: _gathered,
        ops.affine_grad: _affine_grad,
    }
    for op, formula in formulas.items():
        register_flop_formula(op)(formula)
