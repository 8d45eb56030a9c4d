"""OneBitExperts: the experts of a mixture, as transformers' models have them, over packed weights.

The float module has ``gate_up_proj`` ``[count, 2 n, k]`` and ``down_proj`` ``[count, k, n]``; MLX
keeps gate and up apart, and so does this one.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from torch_onebit.checks import NotScriptable, check_kind
from torch_onebit.float_layers import experts_obstacle, projection_shapes, shape_of
from torch_onebit.nn.stack import OneBitStack

SORT_FROM = 64  # products: as mlx-lm; below that sorting costs more than it saves


class OneBitExperts(NotScriptable, nn.Module):
    """``y[t] = sum_j weights[t, j] * expert[chosen[t, j]](x[t])``, every expert gate, up and down.

    Args:
        experts: the float module, whose activation and gate are used; its weights are not kept.
        gate_proj, up_proj, down_proj: its matrices.
    Raises:
        TypeError: something else than a module.
        ValueError: experts of a form that this one does not have, or matrices that do not fit.
    """

    is_onebit = True  # for reports

    def __init__(
        self,
        experts: nn.Module,
        gate_proj: OneBitStack,
        up_proj: OneBitStack,
        down_proj: OneBitStack,
    ) -> None:
        super().__init__()
        check_kind("experts", experts, nn.Module, "an nn.Module")
        reason = experts_obstacle(experts)
        if reason:
            raise ValueError(
                f"experts must be gate, up and down projections, got some where {reason}"
            )
        stacks = {"gate_proj": gate_proj, "up_proj": up_proj, "down_proj": down_proj}
        for name, shape in projection_shapes(experts).items():
            stack = stacks[name]
            if shape_of(stack) != shape:
                raise ValueError(
                    f"{name} must have shape {list(shape)}, got {list(shape_of(stack))}"
                )
            setattr(self, name, stack)
        self._shell = (shell_of(experts),)  # no submodule: who walks would look for its weights
        self.train(experts.training)

    @property
    def group_size(self) -> int:
        return self.down_proj.group_size

    @property
    def symmetric(self) -> bool:
        return self.down_proj.symmetric

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' results ``[tokens, k]``, given what the router chose for every token.

        Args:
            hidden_states: ``[tokens, k]``.
            top_k_index, top_k_weights: ``[tokens, top_k]``.
        """
        tokens, top_k = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        many = chosen.numel() >= SORT_FROM
        if many:
            chosen, order = torch.sort(chosen)
        else:
            order = torch.arange(tokens * top_k, device=chosen.device)
        rows = order // top_k
        gate = self.gate_proj(hidden_states, chosen, rows, sorted_indices=many)
        up = self.up_proj(hidden_states, chosen, rows, sorted_indices=many)
        inner = self._shell[0]._apply_gate(torch.cat([gate, up], -1))
        y = self.down_proj(inner, chosen, sorted_indices=many)
        if many:
            y = y[torch.argsort(order)]
        y = y.view(tokens, top_k, -1).float() * top_k_weights.unsqueeze(-1)
        return y.sum(1).to(hidden_states.dtype)

    @classmethod
    def from_experts(cls, experts: nn.Module, **options: Any) -> "OneBitExperts":
        """Quantize experts; options as in ``OneBitStack.from_weight``.

        Raises:
            ValueError: experts of a form that this one does not have.
        """
        gate, up = experts.gate_up_proj.chunk(2, dim=1)
        weights = (gate, up, experts.down_proj)
        return cls(experts, *(OneBitStack.from_weight(w, **options) for w in weights))

    @classmethod
    def empty(cls, experts: nn.Module, options: dict[str, dict[str, Any]]) -> "OneBitExperts":
        """Experts whose matrices are to be loaded, on the meta device.

        Args:
            options: of ``OneBitStack``, by projection.
        """
        shapes = projection_shapes(experts)
        return cls(
            experts,
            **{
                name: OneBitStack(count, k, n, device="meta", **options[name])
                for name, (count, n, k) in shapes.items()
            },
        )

    def to_experts(self) -> nn.Module:
        """The float module again, of the dequantized weights."""
        stacks = (self.gate_proj, self.up_proj, self.down_proj)
        gate, up, down = (stack.dequantize().detach() for stack in stacks)
        weights = nn.Parameter(torch.cat([gate, up], 1)), nn.Parameter(down)
        return filled(self._shell[0], *weights).train(self.training)


def shell_of(experts: nn.Module) -> nn.Module:
    """The float module that experts are, or were, without its weights: it computes the gate."""
    shell = copy.copy(experts._shell[0] if isinstance(experts, OneBitExperts) else experts)
    shell._parameters = dict.fromkeys(shell._parameters)
    return shell


def filled(shell: nn.Module, gate_up_proj: nn.Parameter, down_proj: nn.Parameter) -> nn.Module:
    """The float module of a shell and these weights."""
    experts = copy.copy(shell)
    experts._parameters = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
    return experts
