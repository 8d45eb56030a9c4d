"""What every swap of a model's layers has in common: which ones, where, with what options."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from torch_onebit.checks import LEVEL_DTYPES, check_callable, check_group_size, check_model

FilterFn = Callable[[nn.Module, str], "bool | dict[str, Any]"]


def layer_options(
    filter_fn: FilterFn | None, layer: nn.Module, name: str, defaults: dict[str, Any]
) -> dict[str, Any] | None:
    """The options that filter_fn wants for a layer, completed by defaults; None: leave the layer.

    Raises:
        ValueError: filter_fn returned an option that defaults does not know, or a group size that
            the format does not.
    """
    if filter_fn is not None:
        check_callable("filter_fn", filter_fn)
    accepted = filter_fn(layer, name) if filter_fn else True
    if not accepted and not isinstance(accepted, dict):
        return None
    chosen = accepted if isinstance(accepted, dict) else {}
    unknown = chosen.keys() - defaults.keys()
    if unknown:
        raise ValueError(
            f"filter_fn must return options among {sorted(defaults)}, got {sorted(unknown)}"
        )
    options = {**defaults, **chosen}
    if "group_size" in options:
        check_group_size(options["group_size"])
    return options


def places(
    model: nn.Module, wanted: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every attribute that holds a wanted module: (name, parent, attribute, module)."""
    check_model(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and wanted(module):
            prefix, _, attribute = name.rpartition(".")
            yield name, model.get_submodule(prefix), attribute, module


def obstacle(layer: nn.Module, group_size: int) -> str | None:
    """Why the format cannot hold a layer, or None."""
    columns = layer.weight.shape[1]
    if columns % group_size:
        return f"{columns} columns are not a multiple of group_size {group_size}"
    if layer.weight.dtype not in LEVEL_DTYPES:
        return f"weights are {layer.weight.dtype}"
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm rewrites rows as they are looked up"
    return None
