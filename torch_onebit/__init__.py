"""1-bit quantization for PyTorch: packed weights, exact kernels, modules and training."""

from importlib.metadata import PackageNotFoundError, version

from torch_onebit._load import load

load()

from torch_onebit.model import QuantizeReport, dequantize_, quantize_  # noqa: E402
from torch_onebit.nn import OneBitEmbedding, OneBitLinear  # noqa: E402
from torch_onebit.ops import (  # noqa: E402
    affine_grad,
    dequantize,
    embedding,
    gather_qmm,
    qmm,
    quantize,
)

try:
    __version__ = version("torch_onebit")
except PackageNotFoundError:  # run from the source tree
    __version__ = "0.1.0"

__all__ = [
    "OneBitEmbedding",
    "OneBitLinear",
    "QuantizeReport",
    "affine_grad",
    "dequantize",
    "dequantize_",
    "embedding",
    "gather_qmm",
    "qmm",
    "quantize",
    "quantize_",
]
