"""QATExperts: experts of a mixture that train latent float weights and compute with 1-bit ones."""

from typing import Any

import torch
from torch import Tensor, nn

from torch_onebit.checks import NotScriptable, check_kind
from torch_onebit.nn import OneBitExperts, OneBitStack
from torch_onebit.nn.experts import filled, shell_of
from torch_onebit.qat.function import binary_weights
from torch_onebit.qat.layers import LatentModule, latent_weight


class QATStack(LatentModule):
    """Latent matrices ``[count, n, k]`` of one shape; ``QATExperts`` multiplies by them."""

    def __init__(
        self, source: nn.Parameter | OneBitStack, method: str, group_size: int, symmetric: bool
    ) -> None:
        super().__init__()
        packed = isinstance(source, OneBitStack)
        self.weight = latent_weight(source) if packed else source
        self.count, self.out_features, self.in_features = self.weight.shape
        self._set_method(method, group_size, symmetric, source)

    def binary(self) -> Tensor:
        """The 1-bit weights as floats ``[count, n, k]``."""
        return binary_weights(self.weight, *self.levels(), self.method, self.group_size)

    def extra_repr(self) -> str:
        shape = f"count={self.count}, in_features={self.in_features}, "
        return f"{shape}out_features={self.out_features}, {self._extra()}"


class QATExperts(NotScriptable, nn.Module):
    """Experts as transformers' models have them, whose weights are 1-bit in forward.

    They compute as the float module does, from weights that are made 1-bit at every call.

    Args:
        experts: the float module, whose ``gate_up_proj`` and ``down_proj`` parameters are taken
            over, not copied; or ``OneBitExperts``, as in ``QATLinear``.
        method, group_size, symmetric: as in ``QATLinear``.
    Raises:
        ValueError: a method or group size that is not allowed.
    """

    is_onebit = True  # for reports

    def __init__(
        self,
        experts: nn.Module,
        *,
        method: str = "mean",
        group_size: int = 128,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        check_kind("experts", experts, nn.Module, "an nn.Module")
        options = method, group_size, symmetric
        self.gate_up_proj = QATStack(_gate_up(experts), *options)
        self.down_proj = QATStack(experts.down_proj, *options)
        self._shell = (shell_of(experts),)  # no submodule: its weights are those of the stacks
        self.train(experts.training)

    @property
    def group_size(self) -> int:
        return self.down_proj.group_size

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        weights = {name: stack.binary() for name, stack in self.named_children()}
        return torch.func.functional_call(self._shell[0], weights, args, kwargs)

    def convert(self, dtype: torch.dtype | None) -> OneBitExperts:
        """The packed experts, with levels in dtype, or in that of the latent weights."""
        gate, up = self._packed(self.gate_up_proj, 2, dtype)
        (down,) = self._packed(self.down_proj, 1, dtype)
        experts = filled(self._shell[0], self.gate_up_proj.weight, self.down_proj.weight)
        return OneBitExperts(experts.train(self.training), gate, up, down)

    def _packed(self, stack: QATStack, parts: int, dtype: torch.dtype | None) -> list[OneBitStack]:
        """The matrices of a stack, whose rows are those of so many."""
        packed, *levels = stack.quantize()
        levels = [t if t is None else t.to(dtype or t.dtype) for t in levels]
        chunks = [[None] * parts if t is None else t.chunk(parts, 1) for t in (packed, *levels)]
        options = {"group_size": self.group_size, "in_features": stack.in_features}
        each = zip(*chunks, strict=True)
        return [OneBitStack.from_packed(*tensors, **options) for tensors in each]


def _gate_up(experts: nn.Module) -> nn.Parameter | OneBitStack:
    """Gate and up, the rows of one above those of the other."""
    if not isinstance(experts, OneBitExperts):
        return experts.gate_up_proj
    gate, up = experts.gate_proj, experts.up_proj
    weight = torch.cat([gate.weight, up.weight], 1)
    scales = torch.cat([gate.scales, up.scales], 1)
    biases = None if gate.symmetric else torch.cat([gate.biases, up.biases], 1)
    options = {"group_size": gate.group_size, "in_features": gate.in_features}
    return OneBitStack.from_packed(weight, scales, biases, **options)
