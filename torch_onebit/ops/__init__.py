"""The operators with types and documentation; each is ``torch.ops.onebit.<name>``.

The format: bit ``b`` of a weight in group ``g`` stands for ``scales[g] * b + biases[g]``. Groups of
32, 64 or 128 weights run along the last dimension; weight ``j`` of a row is bit ``j % 32`` of word
``j // 32``.

A module has the operators of one kind, and for each what PyTorch asks of it: a rule for
``torch.vmap``, and where C++ has none a composite for devices without kernels.
"""

import torch

from torch_onebit.ops import codec, levels, levels_composite, product, tracing
from torch_onebit.ops.codec import dequantize, embedding, quantize
from torch_onebit.ops.levels import (
    RULES,
    fake_quantize,
    fake_quantize_affine,
    fake_quantize_affine_backward,
    fake_quantize_backward,
    quantize_affine,
    quantize_levels,
)
from torch_onebit.ops.product import (
    affine_grad,
    can_prepack,
    cpu_isa,
    gather_qmm,
    linear,
    linear_op,
    linear_prepacked_op,
    prepack,
    qmm,
    qmm_prepacked,
    unprepack,
)

__all__ = [
    "RULES",
    "affine_grad",
    "can_prepack",
    "cpu_isa",
    "dequantize",
    "embedding",
    "fake_quantize",
    "fake_quantize_affine",
    "fake_quantize_affine_backward",
    "fake_quantize_backward",
    "gather_qmm",
    "linear",
    "linear_op",
    "linear_prepacked_op",
    "prepack",
    "qmm",
    "qmm_prepacked",
    "quantize",
    "quantize_affine",
    "quantize_levels",
    "unprepack",
]


def register() -> None:
    """Tell torch.vmap, and devices without kernels, about the operators."""
    for module in (product, codec, levels):
        for name, rule in module.VMAP_RULES.items():
            torch.library.register_vmap(f"onebit::{name}", rule)
    tracing.register()
    levels_composite.register()
