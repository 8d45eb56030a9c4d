"""ONNX export: the operators as standard ONNX operators, weights still one bit each in the file."""

from collections.abc import Callable
from typing import Any

import torch

BITS = 32


def onnx_translations() -> dict[Any, Callable[..., Any]]:
    """What ``torch.onnx.export`` needs to know about the operators of packed layers.

    Pass it as ``custom_translation_table``, with ``dynamo=True`` and ``optimize=False`` (which
    would decode small weights in the file). The model that comes out has int32 words and their
    levels as initializers, one bit per weight, and decodes them with ``BitwiseAnd``, ``Mul`` and
    ``Add`` before an ordinary ``MatMul``: any runtime of opset 18 reads it. Most decode once, when
    they load it: small on disk, float in memory.

    Returns:
        a translation for ``linear``, ``qmm``, ``dequantize`` and ``embedding``. That of prepacked
        weights is an error: call ``unprepack_`` before an export.
    Raises:
        ImportError: onnxscript is not installed (``pip install onnx onnxscript``).
    """
    try:
        from onnxscript import opset18 as op
    except ImportError as error:
        raise ImportError(
            "torch.onnx.export needs onnxscript: run `pip install onnx onnxscript`"
        ) from error
    from onnxscript import INT32, INT64

    def decode(packed: Any, scales: Any, biases: Any, group_size: int, shape: list[int]) -> Any:
        """Weights of this shape in the dtype of scales; -1: a size that only a run knows."""
        masks = op.Constant(value_ints=[*(1 << j for j in range(BITS - 1)), -(1 << (BITS - 1))])
        last = op.Constant(value_ints=[-1])
        words = op.Unsqueeze(op.Cast(packed, to=INT32.dtype), last)
        bits = op.Cast(op.BitwiseAnd(words, op.Cast(masks, to=INT32.dtype)), to=9)  # bool
        groups = op.Constant(value_ints=[*shape[:-1], shape[-1] // group_size, group_size])
        grouped = op.CastLike(op.Reshape(bits, groups), scales)
        if biases is None:
            half = op.CastLike(op.Constant(value_float=-0.5), scales)
            biases = op.Mul(scales, half)
        scaled = op.Mul(grouped, op.Unsqueeze(scales, last))
        values = op.Add(scaled, op.Unsqueeze(biases, last))
        return op.Reshape(values, op.Constant(value_ints=shape))

    def shape_of(packed: Any) -> list[int]:
        *rows, words = (int(size) for size in packed.shape)
        return [*rows, words * BITS]

    def wide(levels: Any) -> Any:
        return None if levels is None else op.Cast(levels, to=1)  # float32

    def qmm(
        x: Any, packed: Any, scales: Any, biases: Any, group_size: int = 128, transpose: bool = True
    ) -> Any:
        w = decode(packed, wide(scales), wide(biases), group_size, shape_of(packed))
        if transpose:
            dims = list(range(len(packed.shape)))
            w = op.Transpose(w, perm=[*dims[:-2], dims[-1], dims[-2]])
        return op.CastLike(op.MatMul(wide(x), w), x)

    def linear(
        x: Any, packed: Any, scales: Any, biases: Any, bias: Any, group_size: int = 128
    ) -> Any:
        y = qmm(x, packed, scales, biases, group_size)
        return y if bias is None else op.Add(y, op.CastLike(bias, y))

    def dequantize(packed: Any, scales: Any, biases: Any, group_size: int = 128) -> Any:
        return decode(packed, scales, biases, group_size, shape_of(packed))

    def embedding(
        indices: Any, packed: Any, scales: Any, biases: Any, group_size: int = 128
    ) -> Any:
        flat = op.Reshape(op.Cast(indices, to=INT64.dtype), op.Constant(value_ints=[-1]))
        chosen = [None if t is None else op.Gather(t, flat) for t in (packed, scales, biases)]
        k = shape_of(packed)[-1]
        rows = decode(*chosen, group_size, [-1, k])
        shape = op.Concat(op.Shape(indices), op.Constant(value_ints=[k]), axis=0)
        return op.Reshape(rows, shape)

    def refuse_prepacked(*arguments: Any) -> Any:
        raise ValueError(
            "model must hold its weights as they are stored, got prepacked ones: call "
            "unprepack_(model) first"
        )

    ops = torch.ops.onebit
    return {
        ops.qmm_prepacked.default: refuse_prepacked,
        ops.linear_prepacked.default: refuse_prepacked,
        ops.qmm.default: qmm,
        ops.linear.default: linear,
        ops.dequantize.default: dequantize,
        ops.embedding.default: embedding,
    }
