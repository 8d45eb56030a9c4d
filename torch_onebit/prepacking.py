"""prepack_: the interleaved copy of a model's weights for decoding on the CPU."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from torch_onebit.nn import OneBitEmbedding, OneBitLinear, OneBitModule
from torch_onebit.surgery import FilterFn, swap_


def prepack_(
    model: nn.Module,
    *,
    filter_fn: FilterFn | None = None,
    skip: Iterable[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Give every OneBitLinear of a model on the CPU an interleaved copy of its weights, in place.

    Products with one to four rows of x (decoding) use it from then on, at the price of holding the
    weights twice. The state_dict stays as it is. Moving a layer, converting or copying it, and
    loading weights drop its copy; after a change of its weights in place, call prepack_ again: a
    forward pass with the old copy is refused. What was done is in ``report(model)``.

    Args:
        model: the model, not itself a layer (use its ``prepack``).
        filter_fn: ``filter_fn(module, name)`` is false to leave a 1-bit layer alone. Given one, it
            is asked about OneBitEmbedding too, whose copy serves ``as_linear``.
        skip: patterns of names to leave, as in ``quantize_``.
        progress: show a progress bar when it takes more than a moment.
    Returns:
        model.
    Raises:
        ValueError: a model that is itself a layer.
        TypeError: an argument of the wrong kind.
    Warns:
        UserWarning: nothing was done, with the reason, or a pattern of skip that no layer matches.
    """
    wanted = OneBitLinear if filter_fn is None else (OneBitLinear, OneBitEmbedding)
    return swap_(
        "prepack_",
        model,
        lambda module: isinstance(module, wanted),
        lambda layer: layer.prepack,
        check=_check,
        filter_fn=filter_fn,
        skip=skip,
        progress=progress,
        hint=": use its prepack",
    )


def _check(layer: OneBitModule, options: dict[str, Any]) -> str | None:
    if layer.weight.device.type != "cpu":
        return f"on {layer.weight.device.type}; prepacked weights serve the cpu"
    if layer.scales.dtype == torch.float64:
        return "float64 levels"
    if not torch.ops.onebit.can_prepack():
        return f"the {torch.ops.onebit.cpu_isa()} kernels have no prepacked form"
    return None
