"""Nested tensors: ``nn.TransformerEncoder`` makes one of a padded batch when nothing needs grad."""

from collections.abc import Callable

import torch
from torch import Tensor


def on_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function, from ``[rows, k]`` to ``[rows, n]``, over all rows of nested x ``[b, *, k]``."""
    if x.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(
            function(x.values()), x.offsets(), x.lengths(), jagged_dim=x._ragged_idx
        )
    sizes = x._nested_tensor_size().clone()
    rows = x.contiguous().values().view(-1, int(sizes[0, -1]))
    y = function(rows)
    sizes[:, -1] = y.shape[-1]
    strides = torch.ones_like(sizes)
    for dim in reversed(range(sizes.shape[1] - 1)):
        strides[:, dim] = strides[:, dim + 1] * sizes[:, dim + 1]
    lengths = sizes.prod(1)
    return torch._nested_view_from_buffer(y.flatten(), sizes, strides, lengths.cumsum(0) - lengths)


def _linear(x, *weights):
    return on_rows(lambda rows: torch.ops.onebit.linear(rows, *weights), x)


def _linear_prepacked(x, *weights):
    return on_rows(lambda rows: torch.ops.onebit.linear_prepacked(rows, *weights), x)


_library = torch.library.Library("onebit", "IMPL")


def register() -> None:
    """Rules of linear layers for nested tensors; gradients follow from what they are made of."""
    for key in ("NestedTensorCPU", "AutogradNestedTensor"):
        _library.impl("linear", _linear, key)
        _library.impl("linear_prepacked", _linear_prepacked, key)
