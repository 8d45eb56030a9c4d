"""The operators of prepacked weights: the same products for any number of rows."""

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative_error

import torch_onebit
from torch_onebit import ops

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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_goes_back_tensor_by_tensor():
    """Prepacked weights share blocks of large pages; no tensor waits for its neighbours."""
    packed, scales, biases = torch_onebit.quantize(torch.randn(2048, 2048), 128)

    def resident() -> float:  # MB
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 1e6

    before = resident()
    layers = [ops.prepack(packed, scales, biases, 128) for _ in range(120)]
    megabytes = sum(layer.numel() for layer in layers) / 1e6
    assert megabytes > 75, "more than a block"
    full = resident() - before
    assert 0.9 * megabytes < full < megabytes + 8
    kept = layers[::2]
    values = kept[0].clone()
    del layers
    assert resident() - before < 0.6 * full
    assert torch.equal(kept[0], values)
    del kept
    assert resident() - before < 0.1 * full
