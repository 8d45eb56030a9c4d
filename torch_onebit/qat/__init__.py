"""Quantization-aware training: latent float weights, 1-bit arithmetic."""

from torch_onebit.qat.experts import QATExperts
from torch_onebit.qat.layers import FakeQuantize, QATEmbedding, QATLinear
from torch_onebit.qat.prepare import convert_, prepare_qat_

__all__ = ["FakeQuantize", "QATEmbedding", "QATExperts", "QATLinear", "convert_", "prepare_qat_"]
