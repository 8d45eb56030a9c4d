"""1-bit quantization for PyTorch: packed weights, exact kernels, modules and training."""

from importlib.metadata import PackageNotFoundError, version

from torch_onebit._load import load

__path__ = [str(load())]

from torch_onebit import averaging, ops
from torch_onebit.averaging import AveragedModel
from torch_onebit.calibration.model import calibrate_
from torch_onebit.calibration.solver import Options as CalibrationOptions
from torch_onebit.loading import load_checkpoint, load_gguf
from torch_onebit.methods import METHODS, quantize_weight
from torch_onebit.model import QuantizeReport, dequantize_, quantize_
from torch_onebit.nn import OneBitEmbedding, OneBitLinear
from torch_onebit.onnx_export import onnx_translations
from torch_onebit.ops import (
    affine_grad,
    dequantize,
    embedding,
    gather_qmm,
    linear,
    prepack,
    qmm,
    quantize,
)
from torch_onebit.prepack import PrepackReport, prepack_
from torch_onebit.qat import QATEmbedding, QATLinear, convert_, prepare_qat_
from torch_onebit.saving import export_gguf, save_checkpoint
from torch_onebit.symmetric import SymmetrizeReport, symmetrize_
from torch_onebit.training import (
    Distillation,
    LoRALinear,
    add_lora_,
    thaw_levels_,
    thaw_lora_,
)

ops.register()
averaging.register()

try:
    __version__ = version("torch_onebit")
except PackageNotFoundError:  # run from the source tree
    __version__ = "0.1.0"

__all__ = [
    "METHODS",
    "AveragedModel",
    "CalibrationOptions",
    "Distillation",
    "LoRALinear",
    "OneBitEmbedding",
    "OneBitLinear",
    "PrepackReport",
    "QATEmbedding",
    "QATLinear",
    "QuantizeReport",
    "SymmetrizeReport",
    "add_lora_",
    "affine_grad",
    "calibrate_",
    "convert_",
    "dequantize",
    "dequantize_",
    "embedding",
    "export_gguf",
    "gather_qmm",
    "linear",
    "load_checkpoint",
    "load_gguf",
    "onnx_translations",
    "prepack",
    "prepack_",
    "prepare_qat_",
    "qmm",
    "quantize",
    "quantize_",
    "quantize_weight",
    "save_checkpoint",
    "symmetrize_",
    "thaw_levels_",
    "thaw_lora_",
]
