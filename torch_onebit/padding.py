"""Matrices whose number of columns no group divides: the last group is filled up.

Packed weights hold whole groups. The columns that fill up the last one meet no input, so their
values only matter for the levels of their group: they repeat the columns of that group, so that
levels come out as those columns alone would have them (exactly for min/max, nearly for the rest).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_onebit.nested import on_rows


def missing(columns: int, group_size: int) -> int:
    """Columns that the last group lacks."""
    return -columns % group_size


def fill(w: Tensor, group_size: int) -> Tensor:
    """w ``[..., k]`` with its last group filled up, w itself where it is full; differentiable."""
    lacking = missing(w.shape[-1], group_size)
    return torch.cat([w, w[..., _repeated(w, lacking, group_size)]], -1) if lacking else w


def pad_rows(x: Tensor, lacking: int) -> Tensor:
    """x ``[..., k]`` with zeros for the columns that are lacking; x may be nested."""
    if x.is_nested:
        return on_rows(lambda rows: F.pad(rows, (0, lacking)), x)
    return F.pad(x, (0, lacking))


def fold(grad: Tensor, columns: int, group_size: int) -> Tensor:
    """The gradient for w, given the one for ``fill(w)``."""
    lacking = missing(columns, group_size)
    if not lacking:
        return grad
    own = grad[..., :columns]
    return own.index_add(-1, _repeated(own, lacking, group_size), grad[..., columns:])


def _repeated(w: Tensor, lacking: int, group_size: int) -> Tensor:
    columns = w.shape[-1]
    width = group_size - lacking  # of what there is of the last group
    return columns - width + torch.arange(lacking, device=w.device) % width
