"""quantize_ and dequantize_: swap the layers of a whole model, in place."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from torch_onebit.methods import check_method
from torch_onebit.nn import OneBitEmbedding, OneBitLinear, OneBitModule, tie
from torch_onebit.report import QuantizeReport
from torch_onebit.surgery import FilterFn, layer_options, obstacle, places


def quantize_(
    model: nn.Module,
    *,
    group_size: int = 128,
    symmetric: bool = False,
    method: str = "optimal",
    filter_fn: FilterFn | None = None,
    progress: bool = True,
) -> nn.Module:
    """Quantize a model to 1 bit in place: every nn.Linear and nn.Embedding that the filter accepts.

    Weights that were tied stay tied. A layer that the format cannot hold is left as it is. What was
    done and what was not, and why, is in ``model.quantize_report``, a ``QuantizeReport`` that
    prints as a table. Subclasses of the two layers are left alone: their owners may look into their
    weights.

    Args:
        model: the model; not itself one of the two layers.
        group_size: weights that share a scale: 32, 64 or 128.
        symmetric: store no biases; weights are ``±scales / 2``.
        method: "optimal" for real-valued weights; "minmax" gives MLX's bits and ruins weights that
            are not already binary; also "sign" and "mean". ``calibrate_`` does better than all.
        filter_fn: ``filter_fn(module, name)`` is false to leave the layer, true to swap it, or a
            dict of ``group_size``, ``symmetric`` and ``method`` for this layer. All layers are
            swapped without it.
        progress: show a progress bar when it takes more than a moment.
    Returns:
        model.
    Raises:
        ValueError: a group size that is not 32, 64 or 128, an option that does not exist, or a
            model that is itself a layer (use ``OneBitLinear.from_linear``).
    """
    if type(model) in _CONVERTERS:
        raise ValueError(
            f"model must contain the layers to swap, got {type(model).__name__} itself: "
            f"use {_CONVERTERS[type(model)].__qualname__}"
        )
    defaults = {"group_size": group_size, "symmetric": symmetric, "method": method}
    report = QuantizeReport()
    chosen = list(_choose(model, defaults, filter_fn, report))  # all decided before any is swapped
    swapped: dict[int, OneBitModule] = {}  # by identity of the layer: one may have several names
    tied: dict[int, OneBitModule] = {}  # by identity of the float weight
    for name, parent, attribute, layer, options in tqdm(
        chosen, desc="quantize", unit="layer", delay=1, disable=None if progress else True
    ):
        if id(layer) not in swapped:
            new = _CONVERTERS[type(layer)](layer, **options)
            owner = tied.setdefault(id(layer.weight), new)
            if owner is not new:
                tie(owner, new)
            swapped[id(layer)] = new
            report.add(name, layer, new, shared=owner is not new)
        setattr(parent, attribute, swapped[id(layer)])
    model.quantize_report = report
    return model


def dequantize_(model: nn.Module) -> nn.Module:
    """Turn every 1-bit layer of a model back into nn.Linear or nn.Embedding, in place.

    The weights are the dequantized ones, in the dtype of the scales; tied layers stay tied.

    Returns:
        model.
    Raises:
        ValueError: a model that is itself a 1-bit layer (use its ``to_linear`` or
            ``to_embedding``).
    """
    if isinstance(model, OneBitModule):
        raise ValueError(
            f"model must contain the layers to swap, got {type(model).__name__} itself"
        )
    swapped: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for _, parent, attribute, layer in places(model, lambda m: isinstance(m, OneBitModule)):
        if id(layer) not in swapped:
            new = layer.to_linear() if isinstance(layer, OneBitLinear) else layer.to_embedding()
            new.weight = weights.setdefault(id(layer.weight), new.weight)
            swapped[id(layer)] = new
        setattr(parent, attribute, swapped[id(layer)])
    if hasattr(model, "quantize_report"):
        del model.quantize_report
    return model


_CONVERTERS: dict[type, Callable[..., OneBitModule]] = {
    nn.Linear: OneBitLinear.from_linear,
    nn.Embedding: OneBitEmbedding.from_embedding,
}


def _choose(
    model: nn.Module, defaults: dict[str, Any], filter_fn: FilterFn | None, report: QuantizeReport
) -> Iterator[tuple[str, nn.Module, str, nn.Module, dict[str, Any]]]:
    """The places to swap, each with its options; what cannot be swapped goes to the report."""
    for name, parent, attribute, layer in places(model, lambda m: type(m) in _CONVERTERS):
        options = layer_options(filter_fn, layer, name, defaults)
        if options is None:
            continue
        check_method(options["method"], options["symmetric"], data=False)
        reason = obstacle(layer, options["group_size"])
        if reason:
            report.skip(name, reason)
        else:
            yield name, parent, attribute, layer, options
