"""Files of other projects to tensors and back; knows no modules.

source.py   what every reader offers
files.py    bounded reading, atomic replacing
mlx.py      folders of safetensors, as mlx-lm writes them
"""

from torch_onebit.checkpoint.mlx import MLXCheckpoint, save_mlx
from torch_onebit.checkpoint.source import CheckpointError, Layer, Packed, Source

__all__ = ["CheckpointError", "Layer", "MLXCheckpoint", "Packed", "Source", "save_mlx"]
