"""The format and its arithmetic in NumPy, float64, one obvious line at a time. Imports only
numpy."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def unpack(packed: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """``[..., words]`` to ``[..., words * 32]``; the least significant bit is the first value."""
    bits = packed[..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    return bits.reshape(*packed.shape[:-1], packed.shape[-1] * 32).astype(bool)


def weights(
    packed: NDArray[np.uint32], scales: Array, biases: Array | None, group_size: int
) -> Array:
    """scale * bit + bias with no rounding; without biases they are -scale / 2."""
    biases = -scales / 2 if biases is None else biases
    spread = lambda t: np.repeat(t, group_size, axis=-1)
    return spread(scales) * unpack(packed) + spread(biases)


def qmm(
    x: Array,
    packed: NDArray[np.uint32],
    scales: Array,
    biases: Array | None,
    group_size: int,
    transpose: bool = True,
) -> Array:
    w = weights(packed, scales, biases, group_size)
    return np.matmul(x, np.swapaxes(w, -1, -2) if transpose else w)


def gather_qmm(
    x: Array,
    packed: NDArray[np.uint32],
    scales: Array,
    biases: Array | None,
    lhs: NDArray[np.int64] | None,
    rhs: NDArray[np.int64] | None,
    group_size: int,
    transpose: bool = True,
) -> Array:
    w = weights(packed, scales, biases, group_size)
    count = lambda t: np.arange(np.prod(t.shape[:-2], dtype=int)).reshape(t.shape[:-2])
    lhs = count(x) if lhs is None else lhs
    rhs = count(w) if rhs is None else rhs
    lhs, rhs = np.broadcast_arrays(lhs, rhs)
    chosen_x = x.reshape(-1, *x.shape[-2:])[lhs]
    chosen_w = w.reshape(-1, *w.shape[-2:])[rhs]
    return np.matmul(chosen_x, np.swapaxes(chosen_w, -1, -2) if transpose else chosen_w)


def quantize(w: NDArray[np.float32], group_size: int) -> tuple[NDArray[np.uint32], Array, Array]:
    """The rule in float32 steps: packed, unrounded scales and biases."""
    groups = w.reshape(-1, group_size)
    packed, scales, biases = [], [], []
    for group in groups:
        low, high = np.float32(np.inf), np.float32(-np.inf)
        for v in group:
            if high < v:
                high = v
            if v < low:
                low = v
        with np.errstate(invalid="ignore", over="ignore"):
            scale = np.float32(high - low)
            if scale < np.float32(1e-7):
                scale = np.float32(1e-7)
            bits = (group - low) > np.float32(0.5) * scale
        words = np.packbits(bits, bitorder="little").view(np.uint32)
        packed.append(words)
        scales.append(scale)
        biases.append(low)
    shape = w.shape[:-1]
    return (
        np.array(packed, dtype=np.uint32).reshape(*shape, -1),
        np.array(scales, dtype=np.float32).reshape(*shape, -1),
        np.array(biases, dtype=np.float32).reshape(*shape, -1),
    )
