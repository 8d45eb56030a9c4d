"""1-bit quantization for PyTorch: packed weights, exact kernels, modules and training."""

from importlib.metadata import PackageNotFoundError, version

from torch_onebit._load import load

__path__ = [str(load())]

from torch_onebit import flops, nested, ops
from torch_onebit.averaging import AveragedModel
from torch_onebit.calibration.model import calibrate_
from torch_onebit.compiling import compile_options
from torch_onebit.distillation import Distillation, distillation_loss
from torch_onebit.loading import load_checkpoint, load_gguf
from torch_onebit.lora import LoRALinear, add_lora_
from torch_onebit.methods import METHODS, quantize_weight
from torch_onebit.nn import (
    OneBitEmbedding,
    OneBitExperts,
    OneBitLinear,
    OneBitModule,
    OneBitStack,
    PrepackedLinear,
    tie,
)
from torch_onebit.onnx_export import onnx_translations
from torch_onebit.ops import (
    affine_grad,
    dequantize,
    embedding,
    gather_qmm,
    linear,
    prepack,
    qmm,
    qmm_prepacked,
    quantize,
    quantize_levels,
    unprepack,
)
from torch_onebit.packing import pack_bits, unpack_bits
from torch_onebit.parameters import (
    ParameterCount,
    count_parameters,
    parameter_groups,
    thaw_levels_,
    thaw_lora_,
)
from torch_onebit.prepacking import prepack_, unprepack_
from torch_onebit.qat import QATEmbedding, QATExperts, QATLinear, convert_, prepare_qat_
from torch_onebit.quantizing import dequantize_, quantize_
from torch_onebit.reports import CalibrationReport, LayerRow, LeftRow, Report, report
from torch_onebit.saving import export_gguf, save_checkpoint
from torch_onebit.solver import CalibrationOptions
from torch_onebit.symmetric import symmetrize_

for rules in (ops, nested, flops):
    rules.register()

try:
    __version__ = version("torch_onebit")
except PackageNotFoundError:  # run from the source tree
    __version__ = "0.2.0"

__all__ = [
    "METHODS",
    "AveragedModel",
    "CalibrationOptions",
    "CalibrationReport",
    "Distillation",
    "LayerRow",
    "LeftRow",
    "LoRALinear",
    "OneBitEmbedding",
    "OneBitExperts",
    "OneBitLinear",
    "OneBitModule",
    "OneBitStack",
    "ParameterCount",
    "PrepackedLinear",
    "QATEmbedding",
    "QATExperts",
    "QATLinear",
    "Report",
    "add_lora_",
    "affine_grad",
    "calibrate_",
    "compile_options",
    "convert_",
    "count_parameters",
    "dequantize",
    "dequantize_",
    "distillation_loss",
    "embedding",
    "export_gguf",
    "gather_qmm",
    "linear",
    "load_checkpoint",
    "load_gguf",
    "onnx_translations",
    "pack_bits",
    "parameter_groups",
    "prepack",
    "prepack_",
    "prepare_qat_",
    "qmm",
    "qmm_prepacked",
    "quantize",
    "quantize_",
    "quantize_levels",
    "quantize_weight",
    "report",
    "save_checkpoint",
    "symmetrize_",
    "thaw_levels_",
    "thaw_lora_",
    "tie",
    "unpack_bits",
    "unprepack",
    "unprepack_",
]
