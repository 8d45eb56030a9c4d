"""LoRA on packed weights: a trainable low-rank product beside frozen bits."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_onebit.checks import check_count, check_kind, check_model, check_number
from torch_onebit.nn import OneBitLinear
from torch_onebit.surgery import FilterFn, swap_


class LoRALinear(nn.Module):
    """A 1-bit linear layer plus a trainable low-rank product: ``base(x) + scaling * (x A^T) B^T``.

    Args:
        base: a packed layer; its bits stay as they are.
        rank: r of A ``[r, k]`` and B ``[n, r]``; B starts at zero, so nothing changes at first.
        alpha: ``scaling = alpha / rank``; ``rank`` without it.
    Raises:
        ValueError: a rank below 1, or an alpha that is not finite.
        TypeError: another kind of layer, or a rank or alpha that is no number.
    """

    is_onebit = True  # for reports: its parameters are not left float

    def __init__(self, base: OneBitLinear, *, rank: int = 8, alpha: float | None = None) -> None:
        super().__init__()
        check_kind("base", base, OneBitLinear, "a OneBitLinear")
        _check_lora(rank, alpha)
        self.base = base
        self.scaling = (rank if alpha is None else alpha) / rank
        like = base.level_options
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_a, self.lora_b
        if not torch.is_autocast_enabled(x.device.type):
            a, b = a.to(x.dtype), b.to(x.dtype)
        return self.base(x) + self.scaling * F.linear(F.linear(x, a), b)

    @property
    def weight(self) -> Tensor:
        """The packed words of the base, for code that looks at the weight of a linear layer."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_a)}, scaling={self.scaling:g}"


def _check_lora(rank: int, alpha: float | None) -> None:
    check_count("rank", rank, 1)
    if alpha is not None:
        check_number("alpha", alpha)


def add_lora_(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float | None = None,
    filter_fn: FilterFn | None = None,
    skip: Iterable[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Put a trainable low-rank product beside every OneBitLinear that is not left out, in place.

    Layers that have one already are left alone. What was done is in ``report(model)``.

    Args:
        model: the model; not itself a OneBitLinear.
        rank, alpha: as in ``LoRALinear``.
        filter_fn: ``filter_fn(module, name)`` is false to leave the layer, true to take it, or a
            dict of ``rank`` and ``alpha`` for this layer.
        skip: patterns of names to leave, as in ``quantize_``.
        progress: show a progress bar when it takes more than a moment.
    Returns:
        model.
    Raises:
        ValueError: a rank or alpha that is not allowed, or a model that is itself a layer (use
            ``LoRALinear``).
        TypeError: an argument of the wrong kind.
    Warns:
        UserWarning: nothing was swapped, or a pattern of skip that no layer matches.
    """
    check_model(model)
    _check_lora(rank, alpha)
    bases = {id(module.base) for module in model.modules() if isinstance(module, LoRALinear)}

    def check(layer: nn.Module, options: dict[str, Any]) -> str | None:
        _check_lora(**options)
        return "it has a low-rank product already" if id(layer) in bases else None

    return swap_(
        "add_lora_",
        model,
        lambda module: isinstance(module, OneBitLinear),
        LoRALinear,
        check=check,
        defaults={"rank": rank, "alpha": alpha},
        filter_fn=filter_fn,
        skip=skip,
        progress=progress,
        hint=": use LoRALinear",
    )
