"""Modules that hold 1-bit weights."""

from torch_onebit.nn.embedding import OneBitEmbedding
from torch_onebit.nn.experts import OneBitExperts
from torch_onebit.nn.linear import OneBitLinear
from torch_onebit.nn.prepacked import PrepackedLinear
from torch_onebit.nn.stack import OneBitStack
from torch_onebit.nn.ties import tie
from torch_onebit.nn.weight import OneBitModule

__all__ = [
    "OneBitEmbedding",
    "OneBitExperts",
    "OneBitLinear",
    "OneBitModule",
    "OneBitStack",
    "PrepackedLinear",
    "tie",
]
