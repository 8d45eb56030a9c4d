"""prepare_qat_ and convert_: a float model into 1-bit training, and from there to packed."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from torch_onebit.checks import check_level_dtype
from torch_onebit.float_layers import is_conv1d, is_experts, is_linear, obstacle
from torch_onebit.nn import (
    OneBitEmbedding,
    OneBitExperts,
    OneBitLinear,
    OneBitModule,
    PrepackedLinear,
    tie,
)
from torch_onebit.ops import quantize_levels
from torch_onebit.padding import fill
from torch_onebit.qat.experts import QATExperts
from torch_onebit.qat.layers import (
    FakeQuantize,
    LatentModule,
    QATEmbedding,
    QATLinear,
    check_qat_method,
)
from torch_onebit.surgery import FilterFn, swap_

_KINDS = (nn.Linear, nn.Embedding, OneBitLinear, PrepackedLinear, OneBitEmbedding, OneBitExperts)
_PACKED = (OneBitModule, OneBitExperts)


def prepare_qat_(
    model: nn.Module,
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    method: str | None = None,
    filter_fn: FilterFn | None = None,
    skip: Iterable[str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Make a model train with 1-bit weights, in place: linear and embedding layers become QAT ones.

    So do the experts of transformers' mixtures that ``quantize_`` takes.

    Parameters of float layers stay the same objects: an optimizer made before keeps working, tied
    weights stay tied. A layer whose weight is parametrized keeps its class and gets one more
    parametrization. What was done and what stayed float is in ``report(model)``.

    Packed layers get latent weights again, at their levels, and keep their group size and form.
    ``calibrate_`` first is the best start there is; with ``Distillation`` train on at the learning
    rate of the float model and without weight decay, otherwise at half that rate.

    Args:
        model: the model; not itself one of the layers.
        group_size: weights that share a scale: 32, 64 or 128. That of packed layers, and 128 for
            float ones, without it.
        symmetric: weights of ``±scale / 2``, converted to the form without biases: methods "sign"
            and "learnable". The form of packed layers, and False for float ones, without it.
        method: how levels follow from latent weights: "mean" (best from float weights, and their
            default), "sign" (the default for symmetric ones), "optimal", "minmax", or "learnable"
            (scales and biases are parameters: best from packed layers, and their default; prepare
            before making the optimizer).
        filter_fn: ``filter_fn(module, name)`` is false to leave the layer, true to swap it, or a
            dict of ``group_size``, ``symmetric`` and ``method`` for this layer.
        skip: patterns of names to leave, as in ``quantize_``.
        progress: show a progress bar when it takes more than a moment.
    Returns:
        model.
    Raises:
        ValueError: a method, group size or option that is not allowed, or a model that is itself a
            layer (use ``QATLinear``).
        TypeError: an argument of the wrong kind.
    Warns:
        UserWarning: nothing was swapped, or a pattern of skip that no layer matches.
    """
    defaults = {"group_size": group_size, "symmetric": symmetric, "method": method}
    _complete(nn.Linear, dict(defaults))
    return swap_(
        "prepare_qat_",
        model,
        lambda module: _kind(module) is not None,
        _prepare,
        check=_check,
        share=_share,
        defaults=defaults,
        filter_fn=filter_fn,
        skip=skip,
        progress=progress,
        hint=": use QATLinear or QATEmbedding",
    )


def convert_(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    filter_fn: FilterFn | None = None,
    skip: Iterable[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Pack a model prepared by ``prepare_qat_``, in place: QAT layers become 1-bit layers.

    Outputs stay those of the prepared model, to rounding of the dtype of scales. Tied layers stay
    tied. What was done is in ``report(model)``.

    Args:
        model: the prepared model; not itself a QAT layer.
        dtype: of scales and biases; that of the latent weights without it. Embeddings go on
            returning rows in the dtype of the latent weights.
        filter_fn: ``filter_fn(module, name)`` is false to leave the layer, true to swap it, or a
            dict of ``dtype`` for this layer.
        skip: patterns of names to leave, as in ``quantize_``.
        progress: show a progress bar when it takes more than a moment.
    Returns:
        model.
    Raises:
        ValueError: a model that is itself a QAT layer, or a dtype that levels cannot have.
        TypeError: an argument of the wrong kind.
    Warns:
        UserWarning: nothing was swapped, or a pattern of skip that no layer matches.
    """
    check_level_dtype(dtype)
    return swap_(
        "convert_",
        model,
        _is_prepared,
        _convert,
        check=lambda layer, options: check_level_dtype(options["dtype"]),
        share=tie,
        defaults={"dtype": dtype},
        filter_fn=filter_fn,
        skip=skip,
        progress=progress,
    )


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """Which of the layers module is, whose weight may be parametrized; None for others."""
    if is_conv1d(module):
        return nn.Linear
    if is_experts(module):
        return OneBitExperts
    for kind in _KINDS:
        if type(module) is kind:
            return kind
        if isinstance(module, kind) and _parametrized(module) and not _is_prepared(module):
            return kind
    return None


def _parametrized(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight")


def _is_prepared(module: nn.Module) -> bool:
    return isinstance(module, QATLinear | QATEmbedding | QATExperts) or (
        _parametrized(module) and isinstance(module.parametrizations.weight[-1], FakeQuantize)
    )


def _complete(
    kind: type[nn.Module], options: dict[str, Any], layer: nn.Module | None = None
) -> None:
    """Fill in what was not chosen, from the packed layer if it is one, and check it."""
    if options["group_size"] is None:
        options["group_size"] = 128 if layer is None else layer.group_size
    if options["symmetric"] is None:
        options["symmetric"] = False if layer is None else layer.symmetric
    if options["method"] is None:
        first = "sign" if options["symmetric"] else "mean"
        options["method"] = first if layer is None else "learnable"
    check_qat_method(options["method"], options["group_size"], options["symmetric"])


def _check(layer: nn.Module, options: dict[str, Any]) -> str | None:
    packed = isinstance(layer, _PACKED)
    _complete(_kind(layer), options, layer if packed else None)
    if not _parametrized(layer):
        return None if packed else obstacle(layer)
    if options["method"] == "learnable" or options["symmetric"]:
        raise ValueError(
            "method must be mean, sign, optimal or minmax, not symmetric, for a parametrized "
            f"weight, got {options['method']}, symmetric={options['symmetric']}"
        )
    return None


def _prepare(layer: nn.Module, **options: Any) -> nn.Module | Callable[[], Any]:
    if _parametrized(layer):
        fake = FakeQuantize(options["method"], options["group_size"])
        return partial(parametrize.register_parametrization, layer, "weight", fake)
    if _kind(layer) is OneBitExperts:
        return QATExperts(layer, **options)
    linear = is_linear(layer) or isinstance(layer, OneBitLinear)
    return (QATLinear if linear else QATEmbedding)(layer, **options)


def _share(owner: LatentModule, other: LatentModule) -> None:
    """Latent weights that were one stay one; the levels are those of the first."""
    if (owner.method, owner.group_size, owner.symmetric) != (
        other.method,
        other.group_size,
        other.symmetric,
    ):
        raise ValueError(
            "filter_fn must want the same options for layers that share their weight, "
            f"got {owner} and {other}"
        )
    other.weight, other.scales, other.biases = owner.weight, owner.scales, owner.biases


@torch.no_grad()
def _convert(layer: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    if isinstance(layer, QATExperts):
        return layer.convert(dtype)
    if isinstance(layer, LatentModule):
        packed, scales, biases = layer.quantize()
        group_size = layer.group_size
    else:
        # The weight has two values per group by now, or one: both come back exactly, also where
        # they are nearer than the least scale of ops.quantize.
        group_size = layer.parametrizations.weight[-1].group_size
        packed, scales, biases = quantize_levels(
            fill(layer.weight, group_size), "minmax", group_size
        )
    dtype = dtype or scales.dtype
    levels = scales.to(dtype), None if biases is None else biases.to(dtype)
    options = {"group_size": group_size}
    if isinstance(layer, QATEmbedding | nn.Embedding):
        latent = layer.weight.dtype
        return OneBitEmbedding.from_packed(
            packed,
            *levels,
            layer.padding_idx,
            embedding_dim=layer.embedding_dim,
            scale_grad_by_freq=layer.scale_grad_by_freq,
            sparse=layer.sparse,
            output_dtype=None if latent == dtype else latent,
            **options,
        )
    return OneBitLinear.from_packed(
        packed, *levels, layer.bias, in_features=layer.in_features, **options
    )
