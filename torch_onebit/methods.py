"""The quantization methods by name: from a float weight to (packed, scales, biases).

    minmax      MLX's bits exactly; for weights that are already binary, never for real-valued ones
    sign        ± mean|w|, the best symmetric levels
    mean        mean ± mean deviation
    optimal     the least squared error of the weights, exactly: the default for real-valued weights
    calibrated  the least squared error of the layer's outputs, given moments of its inputs

docs/which_method.md has what each is worth.
"""

from types import NoneType

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_onebit import ops
from torch_onebit.checks import check_group_size, check_kind
from torch_onebit.ops import quantize_levels
from torch_onebit.padding import fill, missing
from torch_onebit.solver import quantize_calibrated

METHODS = ("minmax", "sign", "mean", "optimal", "calibrated")
SYMMETRIC_METHODS = ("sign", "optimal", "calibrated")


def check_method(method: str, symmetric: bool, *, data: bool = True) -> None:
    """Raise ValueError when there is no such method: for the symmetric form, or without data."""
    methods = SYMMETRIC_METHODS if symmetric else METHODS
    methods = [m for m in methods if data or m != "calibrated"]
    if method not in methods:
        form = " for symmetric weights" if symmetric else ""
        raise ValueError(f"method must be one of {', '.join(methods)}{form}, got {method}")


@torch.no_grad()
def quantize_weight(
    w: Tensor,
    method: str = "optimal",
    group_size: int = 128,
    *,
    symmetric: bool = False,
    importance: Tensor | None = None,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize a matrix to 1 bit by a method.

    Args:
        w: ``[n, k]``, any floating dtype; where ``group_size`` does not divide k, the last group is
            filled up, by columns that count nothing or, for "minmax" and "mean", repeat its own.
        method: one of ``METHODS``.
        group_size: 32, 64 or 128.
        symmetric: weights of ``±scale / 2``: no biases.
        importance: ``[k]`` or ``[n, k]``, for "sign" and "optimal": weights of the squared error,
            such as the mean of ``x**2`` over inputs x.
        moments: ``[k, k]``, for "calibrated" and required there: the mean of ``x x^T``.
    Returns:
        packed ``[n, k // 32]`` int32, scales and biases ``[n, k // group_size]`` in the dtype of w,
        k rounded up to whole groups; biases are None in the symmetric form.
    Raises:
        ValueError: an argument that is not allowed; the message names it and its value.
    """
    check_kind("w", w, Tensor, "a tensor")
    for name, value in (("importance", importance), ("moments", moments)):
        check_kind(name, value, (Tensor, NoneType), "a tensor or None")
    check_method(method, symmetric)
    if (moments is not None) != (method == "calibrated"):
        raise ValueError(
            "moments must be given for method calibrated and for no other "
            f"(torch_onebit.calibrate_ collects them), got {_given(moments)} for {method}"
        )
    check_group_size(group_size)
    if method == "calibrated":
        return quantize_calibrated(w, moments, group_size, symmetric=symmetric)
    lacking = missing(w.shape[-1], group_size)
    if lacking:
        if method in ("sign", "optimal"):
            given = w.new_ones(w.shape[-1]) if importance is None else importance
            importance = F.pad(given, (0, lacking))
        w = fill(w, group_size)
    if method == "minmax":
        if importance is not None:
            raise ValueError("importance must be None for method minmax, got a tensor")
        return ops.quantize(w, group_size)
    if importance is not None and not importance.is_meta and not (importance >= 0).all():
        worst = importance.min().item()  # NaN when there is one
        raise ValueError(f"importance must not be negative or NaN, got {worst}")
    # The best levels of the form ± a are those of the sign rule.
    rule = "sign" if symmetric else method
    packed, scales, biases = quantize_levels(w, rule, group_size, importance)
    return packed, scales, None if symmetric else biases


def _given(t: Tensor | None) -> str:
    return "none" if t is None else "a tensor"
