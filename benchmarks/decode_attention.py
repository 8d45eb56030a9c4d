"""Attention of one new position per sequence to a cache of fixed length, in Triton.

The cache is split among programs, whose partial results a second kernel combines: with one sequence
there are too few heads to fill a device. Queries that share a key head are rows of one product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 64  # of a program


@triton.jit
def part(q, keys, values, position, sums, tops, masses, length, scale, G: tl.constexpr,
         D: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, column, key = tl.arange(0, 16), tl.arange(0, D), tl.arange(0, KEYS)
    queries = tl.load(
        q + (head * G + row)[:, None] * D + column[None, :], mask=row[:, None] < G, other=0.0
    )
    at = (head * length + split * KEYS + key)[:, None] * D + column[None, :]
    scores = tl.dot(queries, tl.trans(tl.load(keys + at)), input_precision="ieee") * scale
    seen = split * KEYS + key <= tl.load(position)
    scores = tl.where(seen[None, :], scores, -1e30)
    top = tl.max(scores, 1)
    weight = tl.where(seen[None, :], tl.exp(scores - top[:, None]), 0.0)
    loaded = tl.load(values + at)
    total = tl.dot(weight.to(loaded.dtype), loaded, input_precision="ieee")
    to = (head * G + row) * tl.num_programs(1) + split
    tl.store(sums + to[:, None] * D + column[None, :], total, mask=row[:, None] < G)
    tl.store(tops + to, top, mask=row < G)
    tl.store(masses + to, tl.sum(weight, 1), mask=row < G)


@triton.jit
def combine(sums, tops, masses, y, SPLITS: tl.constexpr, D: tl.constexpr):
    head, split, column = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, D)
    top = tl.load(tops + head * SPLITS + split)
    factor = tl.exp(top - tl.max(top, 0))
    mass = tl.sum(tl.load(masses + head * SPLITS + split) * factor, 0)
    parts = tl.load(sums + (head * SPLITS + split)[:, None] * D + column[None, :])
    total = tl.sum(parts * factor[:, None], 0) / mass
    tl.store(y + head * D + column, total.to(y.dtype.element_ty))


def attend(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """``q [batch, heads, 1, size]``, ``keys, values [batch, key heads, length, size]``, up to and
    with ``position [1]``; length is 64 times a power of two."""
    batch, heads, _, size = q.shape
    kv_heads, length = keys.shape[1:3]
    splits = length // KEYS
    y, q = torch.empty_like(q), q.contiguous()
    sums = q.new_empty(batch, heads, splits, size, dtype=torch.float32)
    tops, masses = (q.new_empty(batch, heads, splits, dtype=torch.float32) for _ in range(2))
    part[batch * kv_heads, splits](
        q, keys, values, position, sums, tops, masses, length, size**-0.5, heads // kv_heads,
        size, KEYS,
    )  # fmt: skip
    combine[(batch * heads,)](sums, tops, masses, y, splits, size)
    return y
