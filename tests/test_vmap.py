"""torch.vmap: one call with the same numbers, over x, over stacked weights, over indices."""

import warnings

import pytest
import torch
from helpers import make_weights

ops = torch.ops.onebit
B = 3


def stack(*sizes):
    return make_weights(B, *sizes, group_size=32)


def with_prepacked(x, weights) -> dict:
    packed, scales, _ = weights
    prepacked = ops.prepack(*weights, 32)
    form = (len(packed), packed.shape[1] * 32, 32, scales.dtype, False)
    qmm = lambda x, w: ops.qmm_prepacked(x, w, *form)
    many = torch.stack([prepacked] * B)
    return {
        "qmm_prepacked over x": (qmm, (x, prepacked), (0, None)),
        "qmm_prepacked over both": (qmm, (x, many), (0, 0)),
        "unprepack": (lambda w: ops.unprepack(w, *form)[0], (many,), (0,)),
    }


# name: (function of one sample, its arguments with the batch in front or not, in_dims)
def cases() -> dict:
    one, many = make_weights(8, 64, group_size=32), stack(8, 64)
    few, experts = make_weights(4, 8, 64, group_size=32), stack(4, 8, 64)
    x = torch.randn(B, 5, 64)
    qmm = lambda *a: ops.qmm(*a, 32)
    qmm_n = lambda *a: ops.qmm(*a, 32, False)
    gather = lambda x, p, s, b, lhs, rhs: ops.gather_qmm(x, p, s, b, lhs, rhs, 32)
    lhs, rhs = torch.randint(0, 5, (B, 6)), torch.randint(0, 4, (B, 6))
    x3 = torch.randn(B, 5, 2, 64)
    embed = lambda *a: ops.embedding(*a, 32)
    indices = torch.randint(0, 8, (B, 2))
    grads = lambda g, x, p: ops.affine_grad(g, x, p, None, None, 32)
    w, levels = torch.randn(B, 8, 64), (torch.rand(B, 8, 2) + 0.5, torch.randn(B, 8, 2))
    levels_of = lambda w, importance: ops.quantize_levels(w, "optimal", 32, importance)
    affine = lambda *a: ops.fake_quantize_affine(*a, 32)
    return {
        "qmm over x": (qmm, (x, *one), (0, None, None, None)),
        "qmm over a vector": (qmm, (x[:, 0], *one), (0, None, None, None)),
        "qmm over a middle dimension": (qmm, (x.transpose(0, 1), *one), (1, None, None, None)),
        "qmm over weights": (qmm, (x[0], *many), (None, 0, 0, 0)),
        "qmm over both": (qmm, (x, *many), (0, 0, 0, 0)),
        "qmm over both, vectors": (qmm, (x[:, 0], *many), (0, 0, 0, 0)),
        "qmm over scales": (qmm, (x[0], one[0], many[1], one[2]), (None, None, 0, None)),
        "qmm over x, stacked weights": (qmm, (x, *few), (0, None, None, None)),
        "qmm vector, stacked weights": (qmm, (x[:, 0], *few), (0, None, None, None)),
        **with_prepacked(x, one),
        "linear over x and bias": (
            lambda x, bias: torch.ops.onebit.linear(x, *one, bias, 32),
            (x, torch.randn(B, one[0].shape[0])),
            (0, 0),
        ),
        "qmm symmetric": (
            lambda x, p, s: ops.qmm(x, p, s, None, 32),
            (x, many[0], many[1]),
            (0, 0, 0),
        ),
        "qmm transpose=False": (qmm_n, (torch.randn(B, 5, 8), *many), (0, 0, 0, 0)),
        "qmm deep x over weights": (qmm, (torch.randn(2, 5, 64), *many), (None, 0, 0, 0)),
        "gather over x": (gather, (x3, *few, lhs[0], rhs[0]), (0, *[None] * 5)),
        "gather over indices": (gather, (x3[0], *few, lhs, rhs), (*[None] * 4, 0, 0)),
        "gather over rhs, counted x": (
            lambda x, p, s, b, rhs: ops.gather_qmm(x, p, s, b, None, rhs, 32),
            (x3, *few, rhs[:, :5]),
            (0, None, None, None, 0),
        ),
        "gather over all": (gather, (x3, *experts, lhs, rhs), (0,) * 6),
        "dequantize": (lambda *a: ops.dequantize(*a, 32), many, (0, 0, 0)),
        "dequantize over scales": (
            lambda *a: ops.dequantize(*a, 32),
            (one[0], many[1], one[2]),
            (None, 0, None),
        ),
        "embedding over indices": (embed, (indices, *one), (0, None, None, None)),
        "embedding over weights": (embed, (indices[0], *many), (None, 0, 0, 0)),
        "embedding over both": (embed, (indices, *many), (0, 0, 0, 0)),
        "quantize": (lambda w: ops.quantize(w, 32), (x,), (0,)),
        "affine_grad": (grads, (torch.randn(B, 5, 8), x, one[0]), (0, 0, None)),
        "affine_grad of nothing": (  # -1 would be ambiguous
            grads,
            (torch.randn(B, 2, 5, 8), torch.randn(B, 2, 5, 0), one[0][:, :0]),
            (0, 0, None),
        ),
        "affine_grad vectors": (grads, (torch.randn(B, 8), x[:, 0], one[0]), (0, 0, None)),
        "affine_grad vectors, stack": (
            grads,
            (torch.randn(B, 4, 8), x[:, 0], few[0]),
            (0, 0, None),
        ),
        "affine_grad stack": (grads, (torch.randn(B, 4, 5, 8), x, few[0]), (0, 0, None)),
        "affine_grad gather": (
            lambda g, x, lhs, rhs: ops.affine_grad(g, x, few[0], lhs, rhs, 32),
            (torch.randn(B, 6, 2, 8), x3, lhs, rhs),
            (0, 0, 0, 0),
        ),
        "quantize_levels": (lambda w: ops.quantize_levels(w, "mean", 32), (w,), (0,)),
        "quantize_levels, columns": (levels_of, (w, torch.rand(64)), (0, None)),
        "quantize_levels over columns": (levels_of, (w, torch.rand(B, 64)), (0, 0)),
        "quantize_levels over weights": (levels_of, (w[0], torch.rand(B, 8, 64)), (None, 0)),
        "fake_quantize": (lambda w: ops.fake_quantize(w, "mean", 32), (w,), (0,)),
        "fake_quantize_backward": (
            lambda g, w: ops.fake_quantize_backward(g, w, "mean", 32),
            (torch.randn(B, 8, 64), w[0]),
            (0, None),
        ),
        "fake_quantize_affine": (affine, (w, *levels), (0, 0, 0)),
        "fake_quantize_affine over scales": (
            affine,
            (w[0], levels[0], levels[1][0]),
            (None, 0, None),
        ),
        "fake_quantize_affine_backward": (
            lambda *a: ops.fake_quantize_affine_backward(*a, 32),
            (torch.randn(B, 8, 64), w, *levels),
            (0, 0, 0, 0),
        ),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_vmap_equals_a_loop(name):
    function, arguments, in_dims = cases()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a loop would announce itself
        actual = torch.vmap(function, in_dims)(*arguments)
    samples = [
        function(
            *(
                a if dim is None else a.select(dim, i)
                for a, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(B)
    ]
    if isinstance(samples[0], tuple):
        expected = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
    else:
        expected = torch.stack(samples)
    torch.testing.assert_close(actual, expected)


def test_per_sample_gradients():
    packed, scales, biases = make_weights(8, 64, group_size=32)
    x = torch.randn(B, 64)
    loss = lambda s, b, x: ops.qmm(x, packed, s, b, 32).square().sum()
    actual = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), (None, None, 0))(scales, biases, x)
    samples = [torch.func.grad(loss, argnums=(0, 1))(scales, biases, row) for row in x]
    expected = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
    torch.testing.assert_close(actual, expected)
