"""quantize_ and dequantize_: swap the layers of a whole model, in place."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from torch_onebit.checks import check_group_size
from torch_onebit.float_layers import is_embedding, is_experts, is_linear, obstacle
from torch_onebit.methods import check_method
from torch_onebit.nn import OneBitEmbedding, OneBitExperts, OneBitLinear, tie
from torch_onebit.surgery import FilterFn, swap_


def quantize_(
    model: nn.Module,
    *,
    group_size: int = 128,
    symmetric: bool = False,
    method: str = "optimal",
    filter_fn: FilterFn | None = None,
    skip: Iterable[str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Quantize a model to 1 bit in place: every nn.Linear and nn.Embedding that is not left out.

    GPT-2's ``Conv1D`` counts as a linear layer, and experts of transformers' mixtures that are
    gate, up and down projections become ``OneBitExperts``. Weights that were tied stay tied.
    Subclasses of the layers are left alone: their owners may look into their weights. What was done
    and what stayed float, and why, is in ``report(model)``, which prints as a table.

    Args:
        model: the model; not itself one of the layers.
        group_size: weights that share a scale: 32, 64 or 128. The last group of a row is filled up
            where it does not divide the columns.
        symmetric: store no biases; weights are ``±scales / 2``.
        method: "optimal" for real-valued weights; "minmax" gives MLX's bits and ruins weights that
            are not already binary; also "sign" and "mean". ``calibrate_`` does better than all.
        filter_fn: ``filter_fn(module, name)`` is false to leave the layer, true to swap it, or a
            dict of ``group_size``, ``symmetric`` and ``method`` for this layer. All layers are
            swapped without it.
        skip: patterns of names to leave. A pattern matches one or several whole parts of a dotted
            name, ``*`` anything: "lm_head" matches "model.lm_head", and "classifier" everything
            below it. None leaves the heads of transformers' models and what is tied to them, unless
            there is a filter_fn; ``[]`` leaves nothing. See docs/layers.md for what each costs.
        progress: show a progress bar when it takes more than a moment.
    Returns:
        model.
    Raises:
        ValueError: a group size that is not 32, 64 or 128, an option that does not exist, or a
            model that is itself a layer (use ``OneBitLinear.from_linear``). Nothing has changed.
        TypeError: an argument of the wrong kind.
    Warns:
        UserWarning: nothing was swapped, or a pattern of skip that no layer matches.
    """
    defaults = {"group_size": group_size, "symmetric": symmetric, "method": method}
    check_group_size(group_size)
    return swap_(
        "quantize_",
        model,
        _wanted,
        _quantized,
        check=_check,
        share=tie,
        defaults=defaults,
        filter_fn=filter_fn,
        skip=skip,
        progress=progress,
        hint=": use OneBitLinear.from_linear or OneBitEmbedding.from_embedding",
    )


def dequantize_(
    model: nn.Module,
    *,
    filter_fn: FilterFn | None = None,
    skip: Iterable[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Turn every 1-bit layer of a model back into nn.Linear, nn.Embedding or experts, in place.

    The weights are the dequantized ones, in the dtype of the scales; tied layers stay tied.

    Args:
        filter_fn, skip, progress: as in ``quantize_``; there are no options for a layer.
    Returns:
        model.
    Raises:
        ValueError: a model that is itself a 1-bit layer (use its ``to_linear`` or
            ``to_embedding``).
        TypeError: an argument of the wrong kind.
    Warns:
        UserWarning: nothing was swapped, or a pattern of skip that no layer matches.
    """
    return swap_(
        "dequantize_",
        model,
        lambda module: isinstance(module, OneBitLinear | OneBitEmbedding | OneBitExperts),
        _dequantized,
        share=_share,
        filter_fn=filter_fn,
        skip=skip,
        progress=progress,
        hint=": use to_linear or to_embedding",
    )


def _wanted(module: nn.Module) -> bool:
    return is_linear(module) or is_embedding(module) or is_experts(module)


def _check(layer: nn.Module, options: dict[str, Any]) -> str | None:
    check_method(options["method"], options["symmetric"], data=False)
    return obstacle(layer)


def _quantized(layer: nn.Module, **options: Any) -> nn.Module:
    if is_linear(layer):
        return OneBitLinear.from_linear(layer, **options)
    if is_experts(layer):
        return OneBitExperts.from_experts(layer, **options)
    return OneBitEmbedding.from_embedding(layer, **options)


def _dequantized(layer: nn.Module) -> nn.Module:
    if isinstance(layer, OneBitLinear):
        return layer.to_linear()
    return layer.to_experts() if isinstance(layer, OneBitExperts) else layer.to_embedding()


def _share(owner: nn.Module, other: nn.Module) -> None:
    other.weight = owner.weight
