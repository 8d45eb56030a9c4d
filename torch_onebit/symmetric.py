"""symmetrize_: 1.125 instead of 1.25 bits per weight, where that changes nothing."""

from dataclasses import dataclass, field

from torch import nn

from torch_onebit.checks import check_model
from torch_onebit.nn import OneBitModule


@dataclass
class SymmetrizeReport:
    """Names of the layers that became symmetric, and of those whose biases say otherwise."""

    layers: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    bytes_saved: int = 0

    def __str__(self) -> str:
        of = len(self.layers) + len(self.left)
        return f"{len(self.layers)} of {of} layers made symmetric, {self.bytes_saved:,} bytes saved"


def symmetrize_(model: nn.Module) -> SymmetrizeReport:
    """Drop the biases of every 1-bit layer where they are exactly ``-scales / 2``, in place.

    The layers compute the same numbers from 1.125 bits per weight at group 128 (float16 levels),
    not 1.25. Published 1-bit checkpoints and every GGUF Q1_0 tensor are of this form.

    Returns:
        a report; ``print`` shows how many layers it could do.
    """
    check_model(model)
    report = SymmetrizeReport()
    decided: dict[int, bool] = {}  # by identity of the biases: tied layers share them
    for name, module in model.named_modules():
        if not isinstance(module, OneBitModule) or module.biases is None:
            continue
        biases = module.biases
        if id(biases) not in decided:
            decided[id(biases)] = _redundant(module)
            if decided[id(biases)]:
                report.bytes_saved += biases.numel() * biases.element_size()
        if decided[id(biases)]:
            module.drop_biases_()
            report.layers.append(name)
        else:
            report.left.append(name)
    return report


def _redundant(module: OneBitModule) -> bool:
    """In float64, where half of a subnormal scale is exact; infinite levels decode otherwise."""
    scales, biases = module.scales.detach().double(), module.biases.detach().double()
    return bool(scales.isfinite().all() and (biases == -scales / 2).all())
