"""Columns of packed weights, and how large the weights of a layer start."""

import math

from torch import Tensor

from torch_onebit.checks import check_count
from torch_onebit.packing import WORD_BITS


def uniform_std(columns: int) -> float:
    """Standard deviation of nn.Linear's initial weights, uniform in ±1/sqrt(columns)."""
    return 1 / math.sqrt(3 * columns) if columns else 0.0


def stored_columns(weight: Tensor, group_size: int, name: str, columns: int | None) -> int:
    """The columns of packed words ``[rows, words]``: all, or those given, of a last group not full.

    Raises:
        ValueError: columns that need more or fewer groups.
    """
    stored = weight.shape[1] * WORD_BITS
    if columns is None:
        return stored
    check_count(name, columns)
    if not 0 <= stored - columns < group_size:
        raise ValueError(
            f"{name} must fill whole groups but the last of the {stored} columns stored, "
            f"got {columns}"
        )
    return columns
