"""The tables that the tests walk through. Every row says why it is there."""

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
GROUP_SIZES = (32, 64, 128)

# (m, n, groups of k): k is this many groups, so that each row serves every group size.
SHAPES = [
    (1, 1, 1),  # the smallest product there is
    (1, 64, 4),  # decoding: one row, whole tiles
    (1, 70, 5),  # n ends inside a tile, an odd number of groups
    (1, 257, 16),  # one row beyond a multiple of every tile
    (2, 66, 3),  # n a multiple of 2 only
    (3, 65, 7),  # odd everything
    (5, 63, 2),  # one less than a tile
    (8, 128, 9),  # a small batch, k not a multiple of 512
    (13, 40, 1),  # k is one group
    (33, 96, 6),  # one row beyond a tile of 32
    (130, 72, 4),  # hundreds of rows, n a multiple of 8 only
    (257, 33, 3),  # more rows than outputs
    (4, 300, 20),  # k beyond one chunk of 512 at every group size
]
SHAPE_IDS = [f"m{m}-n{n}-{g}groups" for m, n, g in SHAPES]

# Pairs (dtype of x, dtype of scales, group size, has biases): each value of each column meets the
# others somewhere, without the full product.
MIXES = [
    (torch.float32, torch.float32, 128, True),
    (torch.float32, torch.float16, 64, False),  # a float16 checkpoint in a float32 model
    (torch.float32, torch.bfloat16, 32, True),
    (torch.float16, torch.float16, 128, True),
    (torch.float16, torch.float32, 32, False),
    (torch.bfloat16, torch.float16, 128, True),  # a published checkpoint in a bfloat16 model
    (torch.bfloat16, torch.bfloat16, 64, True),
    (torch.bfloat16, torch.bfloat16, 32, False),
    (torch.float64, torch.float64, 64, True),
    (torch.float64, torch.float32, 32, False),
]
MIX_IDS = [
    f"{str(x)[6:]}-{str(s)[6:]}-g{g}-{'affine' if b else 'symmetric'}" for x, s, g, b in MIXES
]
