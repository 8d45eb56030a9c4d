"""add_products_: sums of outer products of bfloat16 rows, in float32."""

import pytest
import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.library import opcheck

ops = torch.ops.onebit

# rows, columns of a, columns of b, upper half only: why
SHAPES = {
    "one tile": (64, 64, 64, False),
    "parts of tiles everywhere": (70, 33, 130, False),
    "an odd row": (1, 3, 5, False),
    "more rows than one pass takes": (1100, 40, 70, False),
    "the upper half, diagonal tiles in part": (200, 150, 150, True),
    "no rows": (0, 8, 8, False),
    "no columns": (8, 8, 0, False),
}


def run(op, *args, plain: bool):
    """By the CPU's kernel, or by what devices without one run."""
    return op.default.redispatch(DispatchKeySet(DispatchKey.XPU), *args) if plain else op(*args)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("rows, n, k, upper", SHAPES.values(), ids=SHAPES)
def test_products_are_added_in_float32(rows, n, k, upper, plain, device):
    a = torch.randn(n, rows).to(device, torch.bfloat16).t()  # strided
    b = a if upper else torch.randn(rows, k).to(device, torch.bfloat16)
    total = torch.randn(n, k).to(device)
    exact = total.cpu().double() + a.cpu().double().t() @ b.cpu().double()
    run(ops.add_products_, total, a, b, upper, plain=plain and device == "cpu")
    if upper:
        total, exact = total.triu(), exact.triu()
    torch.testing.assert_close(total.cpu().double(), exact, rtol=1e-5, atol=1e-5 * max(rows, 1))


def test_sums_do_not_depend_on_threads_and_are_counted_as_changes():
    x = torch.randn(500, 300).bfloat16()
    before, sums = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        sums.append(torch.zeros(300, 300))
        ops.add_products_(sums[-1], x, x, False)
    torch.set_num_threads(before)
    assert torch.equal(*sums)
    assert sums[0]._version == 1


def test_opcheck():
    opcheck(
        ops.add_products_.default,
        (torch.zeros(4, 6), *(torch.ones(3, n).bfloat16() for n in (4, 6))),
    )


SUM, A, B = torch.zeros(4, 6), torch.randn(3, 4).bfloat16(), torch.randn(3, 6).bfloat16()
ERRORS = [
    ((SUM.double(), A, B, False), "sum must be float32, got Double"),
    ((SUM[0], A, B, False), "sum must have 2 dimensions, got 1"),
    ((SUM.t(), B, A, False), "sum must be contiguous, got strides"),
    ((SUM, A.float(), B, False), "a must be bfloat16, got Float"),
    ((SUM, A[0], B, False), "a must have 2 dimensions, got 1"),
    ((SUM, B, B, False), r"a must have shape \[3, 4\].*, got \[3, 6\]"),
    ((SUM, A, B[:2], False), r"b must have shape \[3, 6\].*, got \[2, 6\]"),
    ((SUM, A, B, True), r"sum must be square for its upper half, got \[4, 6\]"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("args, message", ERRORS, ids=[message for _, message in ERRORS])
def test_illegal_arguments(args, message, device):
    args = [t.to(device) if isinstance(t, torch.Tensor) else t for t in args]
    with pytest.raises(ValueError, match=message):
        ops.add_products_(*args)
