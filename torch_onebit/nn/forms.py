"""Layers that hold their weights in a device's own order, taken back to the form of the format."""

from torch import nn


def unprepack_all(*models: nn.Module) -> None:
    """Have every ``PrepackedLinear`` hold weight, scales and biases again, in place."""
    for model in models:
        for module in model.modules():
            if hasattr(module, "unprepack"):
                module.unprepack()
