"""What OneBitLinear and OneBitEmbedding have in common: a packed matrix and its levels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_onebit import ops
from torch_onebit.checks import NotScriptable, check_count, check_group_size, check_level_dtype
from torch_onebit.nn.averages import watch_averages
from torch_onebit.nn.fast_path import decline_fast_path
from torch_onebit.nn.states import legal_entries
from torch_onebit.nn.ties import Tie
from torch_onebit.packing import WORD_BITS
from torch_onebit.padding import missing


class OneBitModule(NotScriptable, nn.Module):
    """A matrix ``[rows, columns]`` of one bit per weight, with a scale and a bias per group.

    Buffers and parameters have the names MLX gives them: ``weight`` ``[rows, stored // 32]`` int32
    (a buffer: no optimizer or dtype conversion touches it), ``scales`` and ``biases``
    ``[rows, stored // group_size]`` (parameters, frozen until ``requires_grad_``); ``biases`` is
    None in the symmetric form, where weights are ``±scales / 2``. ``stored`` is columns rounded up
    to whole groups: what fills up the last one meets zeros.
    """

    is_onebit = True  # for reports: its parameters are not left float

    weight: Tensor
    scales: nn.Parameter
    biases: nn.Parameter | None

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        group_size: int = 128,
        symmetric: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_group_size(group_size)
        check_level_dtype(dtype)
        check_count(self.rows_name, rows)
        check_count(self.columns_name, columns)
        decline_fast_path(self)
        watch_averages()
        self._lacking = missing(columns, group_size)  # columns that fill up the last group
        stored = columns + self._lacking
        self.group_size = group_size
        self.symmetric = symmetric
        self._tie: Tie | None = None
        words = torch.empty(rows, stored // WORD_BITS, dtype=torch.int32, device=device)
        self.register_buffer("weight", words)

        def levels() -> nn.Parameter:
            groups = torch.empty(rows, stored // group_size, device=device, dtype=dtype)
            return nn.Parameter(groups, requires_grad=False)

        self.scales = levels()
        self.register_parameter("biases", None if symmetric else levels())

    rows_name, columns_name = "rows", "columns"

    def _reset_weight(self, std: float) -> None:
        """Random bits with levels ``±std``."""
        with torch.no_grad():
            # MPS does not draw this range of int32.
            drawn = self.weight.cpu() if self.weight.is_mps else self.weight
            self.weight.copy_(drawn.random_(-(2**31), 2**31))
            self.scales.fill_(2 * std)
            if self.biases is not None:
                self.biases.fill_(-std)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch_averages()

    def _take(self, weight: Tensor, scales: Tensor, biases: Tensor | None) -> None:
        """Hold these tensors; legal by ``check_packed``, in the form the layer was made for."""
        self.weight = weight.view(torch.int32)
        self.scales = nn.Parameter(scales.detach(), requires_grad=False)
        self.biases = None if biases is None else nn.Parameter(biases.detach(), requires_grad=False)

    def drop_biases_(self) -> None:
        """Take on the symmetric form: biases become ``-scales / 2``, whatever they were."""
        self.biases = None
        self.symmetric = True

    def canonical(self) -> "OneBitModule":
        """The layer, whose weight, scales and biases can be read and stay as they are."""
        return self

    @property
    def level_options(self) -> dict[str, Any]:
        """``device`` and ``dtype`` of scales and biases."""
        return {"device": self.scales.device, "dtype": self.scales.dtype}

    def dequantize(self) -> Tensor:
        """The weights ``[rows, columns]`` in the dtype of scales."""
        w = ops.dequantize(self.weight, self.scales, self.biases, self.group_size)
        return w[:, : -self._lacking].contiguous() if self._lacking else w

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.nn.utils.fuse_linear_bn_eval scales the words as numbers and stores the result.
        if name == "weight" and isinstance(value, nn.Parameter):
            raise TypeError(
                f"weight must be packed words, no Parameter, got a Parameter of {value.dtype}"
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OneBitModule":
        if self._tie is None:
            return super()._apply(fn, recurse)
        with self._tie.following(self):
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        entries = legal_entries(state_dict, prefix, args[-1])
        if entries is not None:
            super()._load_from_state_dict(entries, prefix, *args)
