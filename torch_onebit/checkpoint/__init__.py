"""Files of other projects to tensors and back; knows no modules.

source.py          what every reader offers
files.py           bounded reading, atomic replacing
mlx.py             folders of safetensors, as mlx-lm writes them
gguf.py            the container of llama.cpp; blocks.py the codecs of its tensors
gguf_models.py     its language models; architectures.py their names and sizes
"""

from torch_onebit.checkpoint.gguf_models import GGUFCheckpoint, save_gguf
from torch_onebit.checkpoint.mlx import MLXCheckpoint, save_mlx
from torch_onebit.checkpoint.source import CheckpointError, Layer, Packed, Source

__all__ = [
    "CheckpointError",
    "GGUFCheckpoint",
    "Layer",
    "MLXCheckpoint",
    "Packed",
    "Source",
    "save_gguf",
    "save_mlx",
]
