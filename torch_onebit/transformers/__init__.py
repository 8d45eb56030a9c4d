"""1-bit models of transformers: importing this registers ``OneBitConfig`` with it.

After ``import torch_onebit.transformers``, ``AutoModelForCausalLM.from_pretrained`` loads a 1-bit
folder of MLX as it is, and with ``quantization_config=OneBitConfig(...)`` any float model as 1-bit;
``save_pretrained`` writes what both ``from_pretrained`` and mlx-lm read.
"""

from torch_onebit.transformers.config import OneBitConfig
from torch_onebit.transformers.quantizer import OneBitQuantizer, attach_quantizer_
from torch_onebit.transformers.registration import register

register()

__all__ = ["OneBitConfig", "OneBitQuantizer", "attach_quantizer_"]
