"""What the Python API accepts, in the words of csrc/ops: argument, rule and value."""

from math import isfinite
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

GROUP_SIZES = (32, 64, 128)
LEVEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _check(right_type: bool, legal: bool, message: str) -> None:
    """A TypeError where Python means one, a ValueError where only the value is wrong."""
    if not right_type:
        raise TypeError(message)
    if not legal:
        raise ValueError(message)


def check_group_size(group_size: Any) -> None:
    _check(
        type(group_size) is int,
        group_size in GROUP_SIZES,
        f"group_size must be 32, 64 or 128, got {group_size!r}",
    )


def check_count(name: str, value: Any, least: int = 0) -> None:
    integer = isinstance(value, Integral) and not isinstance(value, bool)
    message = f"{name} must be an integer of at least {least}, got {value!r}"
    _check(integer, integer and value >= least, message)


def check_number(name: str, value: Any, least: float | None = None) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    legal = number and isfinite(value) and (least is None or value >= least)
    rule = "a finite number" if least is None else f"a finite number of at least {least}"
    _check(number, legal, f"{name} must be {rule}, got {value!r}")


def check_level_dtype(dtype: Any, name: str = "dtype") -> None:
    _check(
        dtype is None or isinstance(dtype, torch.dtype),
        dtype is None or dtype in LEVEL_DTYPES,
        f"{name} must be float32, float16, bfloat16 or float64, got {dtype!r}",
    )


def check_callable(name: str, value: Any) -> None:
    _check(callable(value), True, f"{name} must be callable, got {value!r}")


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], words: str) -> None:
    _check(isinstance(value, kinds), True, f"{name} must be {words}, got {type(value).__name__}")


def check_skip(skip: Any) -> None:
    patterns = not isinstance(skip, str) and all(isinstance(pattern, str) for pattern in skip)
    _check(patterns, True, f"skip must be a list of patterns of names, got {skip!r}")


def check_model(model: Any) -> None:
    check_kind("model", model, nn.Module, "an nn.Module")


def check_packed(weight: Any, scales: Any, biases: Any, group_size: Any) -> None:
    """One matrix of the format: words ``[n, k // 32]``, levels ``[n, k // group_size]``."""
    check_group_size(group_size)
    for name, value in (("weight", weight), ("scales", scales), ("biases", biases)):
        if not isinstance(value, Tensor) and not (name == "biases" and value is None):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if weight.dtype not in (torch.int32, torch.uint32):
        raise ValueError(f"weight must be int32 or uint32, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions, got {weight.dim()}")
    words = group_size // 32
    if weight.shape[1] % words:
        raise ValueError(
            f"weight must have a last dimension of whole groups of {words} words, "
            f"got {weight.shape[1]}"
        )
    groups = [weight.shape[0], weight.shape[1] // words]
    for name, levels in (("scales", scales), ("biases", biases)):
        if levels is None:
            continue
        if levels.dtype not in LEVEL_DTYPES:
            raise ValueError(
                f"{name} must be float32, float16, bfloat16 or float64, got {levels.dtype}"
            )
        if list(levels.shape) != groups:
            raise ValueError(f"{name} must have shape {groups}, got {list(levels.shape)}")
    if biases is not None and biases.dtype != scales.dtype:
        raise ValueError(
            f"biases must have the dtype of scales, {scales.dtype}, got {biases.dtype}"
        )


class NotScriptable:
    """A module whose forward pass is Python: TorchScript would fail on it, many lines in."""

    def __prepare_scriptable__(self) -> None:
        raise NotImplementedError(
            f"torch.jit.script must be given modules that it can compile, got {type(self).__name__}"
            ": use torch.jit.trace or torch.export, which take it"
        )
