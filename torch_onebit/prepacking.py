"""prepack_: a model's weights in the order in which kernels of the CPU read them; and back."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from torch_onebit.checks import check_model
from torch_onebit.nn import OneBitLinear, OneBitModule, PrepackedLinear
from torch_onebit.surgery import FilterFn, change_, swap_


def prepack_(
    model: nn.Module,
    *,
    filter_fn: FilterFn | None = None,
    skip: Iterable[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Have every OneBitLinear of a model on the CPU hold its weights in kernel order, in place.

    For inference: products with any number of rows of x are faster. Nothing is held twice: a layer
    becomes a ``PrepackedLinear``, with one buffer for weight, scales and biases, and an
    ``OneBitLinear`` again before anything can change those (``train()``, loading, moving,
    converting, reading or setting one of them). The state_dict stays as it is. What was done is in
    ``report(model)``.

    Args:
        model: the model, not itself a layer (use its ``prepack``).
        filter_fn: ``filter_fn(module, name)`` is false to leave an OneBitLinear alone.
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
    check_model(model)
    held = Counter(id(m.weight) for m in model.modules() if _is_canonical(m))

    def check(layer: OneBitLinear, options: dict[str, Any]) -> str | None:
        if isinstance(layer, PrepackedLinear):
            return "prepacked already"
        try:
            layer.check_prepackable()
        except (NotImplementedError, TypeError, ValueError) as error:
            return str(error)
        return "another layer has its weights too" if held[id(layer.weight)] > 1 else None

    return swap_(
        "prepack_",
        model,
        lambda module: isinstance(module, OneBitLinear),
        lambda layer: layer.prepack,
        check=check,
        filter_fn=filter_fn,
        skip=skip,
        progress=progress,
        hint=": use its prepack",
    )


def _is_canonical(module: nn.Module) -> bool:
    return isinstance(module, OneBitModule) and not isinstance(module, PrepackedLinear)


def unprepack_(
    model: nn.Module,
    *,
    filter_fn: FilterFn | None = None,
    skip: Iterable[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Have prepacked layers hold weight, scales and biases again, in place.

    Args:
        model: a model with prepacked layers, or one of them.
        filter_fn: ``filter_fn(module, name)`` is false to leave the layer as it is.
        skip, progress: as in ``quantize_``.
    Returns:
        model.
    Raises:
        TypeError: an argument of the wrong kind.
    Warns:
        UserWarning: a pattern of skip that no layer matches.
    """
    return change_(
        "unprepack_",
        model,
        PrepackedLinear,
        PrepackedLinear.unprepack,
        filter_fn=filter_fn,
        skip=skip,
        progress=progress,
    )
