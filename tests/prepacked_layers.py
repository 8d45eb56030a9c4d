"""Layers to prepack, and what they should compute."""

import pytest
import torch
from torch import nn

from torch_onebit import OneBitLinear, PrepackedLinear, ops

needs_kernel = pytest.mark.skipif(
    not ops.can_prepack(), reason="layers hold prepacked weights where kernels read them"
)


def make_layer(**options) -> OneBitLinear:
    layer = OneBitLinear(256, 70, **options).eval()
    with torch.no_grad():
        layer.scales.mul_(torch.rand_like(layer.scales) + 0.5)
    return layer


def prepacked_layer(**options) -> PrepackedLinear:
    layer = make_layer(**options)
    layer.prepack()
    assert type(layer) is PrepackedLinear
    return layer


X = torch.linspace(-1, 2, 3 * 256).view(3, 256)


def shown(layer: nn.Module) -> torch.Tensor:
    """The product with the weights that the layer shows, by plain torch."""
    bias = 0 if layer.bias is None else layer.bias
    return X[:, : layer.in_features] @ layer.dequantize().float().T + bias
