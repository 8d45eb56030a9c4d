"""symmetrize_: 1.125 instead of 1.25 bits per weight, where that changes nothing."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from torch_onebit.nn import OneBitModule
from torch_onebit.surgery import FilterFn, swap_


def symmetrize_(
    model: nn.Module,
    *,
    filter_fn: FilterFn | None = None,
    skip: Iterable[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Drop the biases of every 1-bit layer where they are exactly ``-scales / 2``, in place.

    The layers compute the same numbers from 1.125 bits per weight at group 128 (float16 levels),
    not 1.25. Published 1-bit checkpoints and every GGUF Q1_0 tensor are of this form. What was done
    is in ``report(model)``.

    Args:
        model: the model; not itself a layer (use its ``drop_biases_``).
        filter_fn, skip, progress: as in ``quantize_``; there are no options for a layer.
    Returns:
        model.
    Raises:
        ValueError: a model that is itself a layer.
        TypeError: an argument of the wrong kind.
    Warns:
        UserWarning: nothing was changed, or a pattern of skip that no layer matches.
    """
    known: dict[nn.Parameter, bool] = {}  # tied layers share their biases

    def check(layer: OneBitModule, options: dict[str, Any]) -> str | None:
        own = layer.canonical()
        if own.biases is None:
            return "it is symmetric already"
        if own.biases not in known:
            known[own.biases] = _redundant(own)
        return None if known[own.biases] else "its biases are not -scales / 2"

    return swap_(
        "symmetrize_",
        model,
        lambda module: isinstance(module, OneBitModule),
        lambda layer: layer.drop_biases_,
        check=check,
        filter_fn=filter_fn,
        skip=skip,
        progress=progress,
        hint=": use its drop_biases_",
    )


def _redundant(module: OneBitModule) -> bool:
    """In float64, where half of a subnormal scale is exact; infinite levels decode otherwise."""
    scales, biases = module.scales.detach().double(), module.biases.detach().double()
    return bool(scales.isfinite().all() and (biases == -scales / 2).all())
