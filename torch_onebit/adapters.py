"""Adapters of the package peft in a model whose layers change, known without importing it."""

from collections.abc import Iterator
from typing import Any, NoReturn

from torch import nn


def adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Layers of peft that hold the layer they adapt as ``base_layer``."""
    for module in model.modules():
        if type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer"):
            yield module


def staying(model: nn.Module) -> dict[int, str]:
    """Why float layers of adapters, or below them, stay, by their identity."""
    found = {}
    for adapter in adapters(model):
        for name, inner in adapter.named_modules():
            if name and name.split(".")[0] != "base_layer":
                found[id(inner)] = "an adapter of peft, trained in float"
        if getattr(adapter, "merged", False):
            found[id(adapter.base_layer)] = "its adapter is merged: unmerge it first"
    return found


def guard(model: nn.Module) -> None:
    """Have adapters over 1-bit layers refuse to merge: peft would add them to packed words, or to
    latent weights, of which only the bits follow."""
    for adapter in adapters(model):
        if any(getattr(module, "is_onebit", False) for module in adapter.base_layer.modules()):
            adapter.merge = refuse_merge
        elif vars(adapter).get("merge") is refuse_merge:
            del adapter.merge


def refuse_merge(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "merge must have float weights to add an adapter to, got 1-bit ones: keep the adapter, "
        "or merge it into the float model and quantize that"
    )
