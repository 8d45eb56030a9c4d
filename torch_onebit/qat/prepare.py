"""prepare_qat_ and convert_: a float model into 1-bit training, and from there to packed."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from torch_onebit.checks import check_level_dtype
from torch_onebit.nn import OneBitEmbedding, OneBitLinear, OneBitModule, tie
from torch_onebit.ops import quantize_levels
from torch_onebit.qat.layers import (
    FakeQuantize,
    LatentModule,
    QATEmbedding,
    QATLinear,
    check_rule,
)
from torch_onebit.surgery import FilterFn, layer_options, obstacle, places

_QAT_LAYERS: dict[type, type[LatentModule]] = {
    nn.Linear: QATLinear,
    nn.Embedding: QATEmbedding,
    OneBitLinear: QATLinear,
    OneBitEmbedding: QATEmbedding,
}


def prepare_qat_(
    model: nn.Module,
    *,
    rule: str | None = None,
    group_size: int = 128,
    symmetric: bool = False,
    filter_fn: FilterFn | None = None,
) -> nn.Module:
    """Make a model train with 1-bit weights, in place: linear and embedding layers become QAT ones.

    Parameters of float layers stay the same objects: an optimizer made before keeps working, tied
    weights stay tied. A layer whose weight is parametrized keeps its class and gets one more
    parametrization. Layers that the format cannot hold are left as they are.

    Packed layers get latent weights again, at their levels, and keep their group size.
    ``calibrate_`` first is the best start there is; with ``Distillation`` train on at the learning
    rate of the float model and without weight decay, otherwise at half that rate.

    Args:
        model: the model; not itself one of the two layers.
        rule: how levels follow from latent weights: "mean" (best from float weights, and their
            default), "sign", "optimal", "minmax", or "learnable" (scales and biases are parameters:
            best from packed layers, and their default; prepare before making the optimizer).
        group_size: weights that share a scale, of float layers: 32, 64 or 128.
        symmetric: convert to weights of ``±scale / 2`` without biases; rule "sign" only.
        filter_fn: ``filter_fn(module, name)`` is false to leave the layer, true to swap it, or a
            dict of ``rule``, ``group_size`` and ``symmetric`` for this layer.
    Returns:
        model.
    Raises:
        ValueError: a rule, group size or option that is not allowed, or a model that is itself a
            layer (use ``QATLinear``).
    """
    check_rule(rule or "mean", group_size, symmetric)
    if _float_layer(model) is not None:
        raise ValueError(
            f"model must contain the layers to swap, got {type(model).__name__} itself"
        )
    defaults = {"rule": rule, "group_size": group_size, "symmetric": symmetric}
    chosen = list(_choose(model, filter_fn, defaults))  # all decided before any is swapped
    swapped: dict[int, nn.Module] = {}
    first: dict[int, LatentModule] = {}  # by identity of the weight it was made from
    for parent, attribute, layer, options in chosen:
        if id(layer) not in swapped:
            swapped[id(layer)] = new = _prepare(layer, options)
            if isinstance(new, LatentModule):
                owner = first.setdefault(id(layer.weight), new)
                new.weight, new.scales, new.biases = owner.weight, owner.scales, owner.biases
        setattr(parent, attribute, swapped[id(layer)])
    return model


def convert_(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Pack a model prepared by ``prepare_qat_``, in place: QAT layers become 1-bit layers.

    Outputs stay those of the prepared model, to rounding of the dtype of scales. Tied layers stay
    tied.

    Args:
        model: the prepared model; not itself a QAT layer.
        dtype: of scales and biases; that of the latent weights without it.
    Returns:
        model.
    Raises:
        ValueError: a model that is itself a QAT layer, or a dtype that levels cannot have.
    """
    check_level_dtype(dtype)
    if isinstance(model, LatentModule):
        raise ValueError(
            f"model must contain the layers to swap, got {type(model).__name__} itself"
        )
    swapped: dict[int, OneBitModule] = {}
    tied: dict[int, OneBitModule] = {}
    for _, parent, attribute, layer in list(places(model, _is_prepared)):
        if id(layer) not in swapped:
            swapped[id(layer)] = new = _convert(layer, dtype)
            if isinstance(layer, LatentModule):
                owner = tied.setdefault(id(layer.weight), new)
                if owner is not new:
                    tie(owner, new)
        setattr(parent, attribute, swapped[id(layer)])
    return model


def _float_layer(module: nn.Module) -> type[nn.Module] | None:
    """The key of _QAT_LAYERS for module, whose weight may be parametrized; None for others."""
    for kind in _QAT_LAYERS:
        if type(module) is kind:
            return kind
        if isinstance(module, kind) and _parametrized(module) and not _is_prepared(module):
            return kind
    return None


def _parametrized(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight")


def _is_prepared(module: nn.Module) -> bool:
    return isinstance(module, LatentModule) or (
        _parametrized(module) and isinstance(module.parametrizations.weight[-1], FakeQuantize)
    )


def _choose(
    model: nn.Module, filter_fn: FilterFn | None, defaults: dict[str, Any]
) -> Iterator[tuple[nn.Module, str, nn.Module, dict[str, Any]]]:
    """The places to swap, each with its options, which are legal."""
    for name, parent, attribute, layer in places(model, lambda m: bool(_float_layer(m))):
        options = layer_options(filter_fn, layer, name, defaults)
        if options is None:
            continue
        packed = isinstance(layer, OneBitModule)
        options["rule"] = options["rule"] or ("learnable" if packed else "mean")
        if packed:
            options["group_size"] = layer.group_size
        elif obstacle(layer, options["group_size"]):
            continue
        check_rule(**options)
        if _parametrized(layer) and (options["rule"] == "learnable" or options["symmetric"]):
            raise ValueError(
                "rule must be mean, sign, optimal or minmax, not symmetric, for a parametrized "
                f"weight, got {options['rule']}, symmetric={options['symmetric']}"
            )
        yield parent, attribute, layer, options


def _prepare(layer: nn.Module, options: dict[str, Any]) -> nn.Module:
    if not _parametrized(layer):
        return _QAT_LAYERS[type(layer)](layer, **options)
    parametrization = FakeQuantize(options["rule"], options["group_size"])
    parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


@torch.no_grad()
def _convert(layer: nn.Module, dtype: torch.dtype | None) -> OneBitModule:
    if isinstance(layer, LatentModule):
        packed, scales, biases = layer.quantize()
        group_size = layer.group_size
    else:
        # The weight has two values per group by now, or one: both come back exactly, also where
        # they are nearer than the least scale of ops.quantize.
        group_size = layer.parametrizations.weight[-1].group_size
        packed, scales, biases = quantize_levels(layer.weight, "minmax", group_size)
    dtype = dtype or scales.dtype
    levels = scales.to(dtype), None if biases is None else biases.to(dtype)
    if isinstance(layer, QATEmbedding | nn.Embedding):
        new = OneBitEmbedding.from_packed(packed, *levels, layer.padding_idx, group_size=group_size)
    else:
        new = OneBitLinear.from_packed(packed, *levels, layer.bias, group_size=group_size)
    return new.train(layer.training)
