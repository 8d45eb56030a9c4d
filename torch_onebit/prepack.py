"""prepack_: the interleaved copy of a model's weights for decoding on the CPU."""

import warnings
from dataclasses import dataclass, field

import torch
from torch import nn

from torch_onebit.nn import OneBitLinear, OneBitModule
from torch_onebit.surgery import FilterFn


@dataclass
class PrepackReport:
    """Layers prepacked, with the bytes of their weights and of the copy, and layers left alone."""

    layers: list[tuple[str, int, int]] = field(default_factory=list)  # name, bytes, bytes added
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name, reason

    @property
    def bytes_added(self) -> int:
        return sum(added for _, _, added in self.layers)

    def __str__(self) -> str:
        width = max([5, *(len(name) for name, _, _ in self.layers)])
        lines = [f"{'layer'.ljust(width)}  {'bytes':>13}  {'added':>13}"]
        lines += [f"{n.ljust(width)}  {size:>13,}  {added:>13,}" for n, size, added in self.layers]
        total = sum(size for _, size, _ in self.layers)
        lines.append(f"{len(self.layers)} layers, {total:,} bytes and {self.bytes_added:,} added")
        lines += [f"left as it was: {name} ({reason})" for name, reason in self.skipped]
        return "\n".join(lines)


def prepack_(model: nn.Module, *, filter_fn: FilterFn | None = None) -> PrepackReport:
    """Give every OneBitLinear of a model on the CPU an interleaved copy of its weights, in place.

    Products with one to four rows of x (decoding) use it from then on, at the price of holding the
    weights twice. The state_dict stays as it is. Moving a layer, converting or copying it, and
    loading weights drop its copy; after a change of its weights in place, call prepack_ again: a
    forward pass with the old copy is refused.

    Args:
        model: the model, or a layer.
        filter_fn: ``filter_fn(module, name)`` is false to leave a 1-bit layer alone. Given one, it
            is asked about OneBitEmbedding too, whose copy serves ``as_linear``.
    Returns:
        a ``PrepackReport``, which prints as a table.
    Warns:
        UserWarning: the kernels of this machine have no such form; nothing was done.
    """
    report = PrepackReport()
    if not torch.ops.onebit.can_prepack():
        isa = torch.ops.onebit.cpu_isa()
        warnings.warn(
            f"prepack_ did nothing: the {isa} kernels use weights as they are", stacklevel=2
        )
    for name, layer in _layers(model):
        if not (isinstance(layer, OneBitLinear) if filter_fn is None else filter_fn(layer, name)):
            continue
        if reason := _obstacle(layer):
            report.skipped.append((name, reason))
            continue
        tensors = [layer.weight, layer.scales, layer.biases]
        size = sum(t.nbytes for t in tensors if t is not None)
        report.layers.append((name, size, layer.prepack()))
    return report


def _layers(model: nn.Module) -> list[tuple[str, OneBitModule]]:
    """Every 1-bit layer once, with its name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, OneBitModule)]


def _obstacle(layer: OneBitModule) -> str | None:
    if layer.weight.device.type != "cpu":
        return f"on {layer.weight.device.type}; prepacked weights serve the cpu"
    if layer.scales.dtype == torch.float64:
        return "float64 levels"
    if not torch.ops.onebit.can_prepack():
        return f"the {torch.ops.onebit.cpu_isa()} kernels have no prepacked form"
    return None
