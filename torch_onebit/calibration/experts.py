"""The experts of a mixture, calibrated: every matrix for the rows that the router gives its expert.

Inputs are those of the 1-bit model, and what experts aim at is what the float ones make of the
same: where the two models' routers choose differently, the float model has no outputs to aim at.
The down projection is given what the 1-bit gate and up make of them, and makes up for their error.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_onebit import ops
from torch_onebit.calibration.layer import Normal, Result, calibrate_layer, relative, without_data
from torch_onebit.calibration.moments import ROWS, InputMoments, OutputMoments
from torch_onebit.nn import OneBitExperts, OneBitStack
from torch_onebit.solver import CalibrationOptions


class Routed(NamedTuple):
    """What experts are called with."""

    hidden_states: Tensor  # [tokens, k]
    top_k_index: Tensor  # [tokens, top_k]
    top_k_weights: Tensor


class _Fit(NamedTuple):
    """How to make matrices 1-bit."""

    group_size: int
    symmetric: bool
    options: CalibrationOptions

    def matrices(self, weights: list[Tensor], x: Tensor, targets: list[Tensor]) -> list[Result]:
        """Matrices ``[n, k]`` that are given the same rows ``[m, k]``."""
        layers = [_linear(w) for w in weights]
        if not len(x):
            return [without_data(layer, self.group_size, self.symmetric, "") for layer in layers]
        inputs = InputMoments(x.shape[1], x.device)
        outputs = [OutputMoments(len(w), inputs) for w in weights]
        for begin in range(0, len(x), ROWS):
            shifted = inputs.add(x[begin : begin + ROWS])
            for sums, target in zip(outputs, targets, strict=True):
                sums.add(target[begin : begin + ROWS], shifted)
        normal = Normal(inputs, False, self.options.damping)
        return [
            calibrate_layer(layer, normal, sums, *self, 0)
            for layer, sums in zip(layers, outputs, strict=True)
        ]

    def floats(self, result: Result, k: int) -> Tensor:
        levels = result.packed, result.scales, result.biases
        return ops.dequantize(*levels, self.group_size)[:, :k]


@torch.no_grad()
def calibrate_experts(
    experts: nn.Module,
    routed: Routed | None,
    group_size: int,
    symmetric: bool,
    options: CalibrationOptions,
) -> Result:
    """Calibrate the experts of a mixture, one after the other; those without rows, or all where
    there is nothing routed, by method "optimal".

    ``output_error`` is that of the sums over experts which the module returns.
    """
    fit = _Fit(group_size, symmetric, options)
    count = len(experts.down_proj)
    found: dict[str, list[Result]] = {"gate_proj": [], "up_proj": [], "down_proj": []}
    unused, energies, errors = 0, 0.0, 0.0
    for e in range(count):
        gate, up = experts.gate_up_proj[e].chunk(2)
        down = experts.down_proj[e]
        if routed is None:
            x = gate.new_empty(0, gate.shape[1])
        else:
            x = routed.hidden_states[(routed.top_k_index == e).any(-1)]
        unused += not len(x)
        wanted = [F.linear(x, gate), F.linear(x, up)]
        results = fit.matrices([gate, up], x, wanted)
        given = [F.linear(x, fit.floats(result, x.shape[1])) for result in results]
        inner, wanted_inner = (experts._apply_gate(torch.cat(t, -1)) for t in (given, wanted))
        results += fit.matrices([down], inner, [F.linear(wanted_inner, down)])
        for name, w, result in zip(found, (gate, up, down), results, strict=True):
            energy = float(w.double().square().sum())
            energies, errors = energies + energy, errors + energy * result.weight_error
            found[name].append(result)
    result = Result(
        None, None, None, weight_error=relative(errors, energies), stacks=_stacked(found)
    )
    if routed is not None:
        result.output_error = _error(experts, packed(experts, result, group_size), routed)
        if unused:
            result.note = f"{unused} of {count} experts without rows"
    return result


def packed(experts: nn.Module, result: Result, group_size: int) -> OneBitExperts:
    """The 1-bit experts of a result."""
    columns = {"gate_proj": experts.gate_up_proj.shape[-1]}
    columns["up_proj"], columns["down_proj"] = columns["gate_proj"], experts.down_proj.shape[-1]
    stacks = {
        name: OneBitStack.from_packed(*levels, group_size=group_size, in_features=columns[name])
        for name, levels in result.stacks.items()
    }
    return OneBitExperts(experts, **stacks)


def _stacked(found: dict[str, list[Result]]) -> dict[str, tuple[Tensor | None, ...]]:
    stacks = {}
    for name, results in found.items():
        tensors = zip(*((r.packed, r.scales, r.biases) for r in results), strict=True)
        stacks[name] = tuple(None if t[0] is None else torch.stack(t) for t in tensors)
    return stacks


def _error(experts: nn.Module, new: nn.Module, routed: Routed) -> float:
    difference = energy = 0.0
    for part in zip(*(t.split(ROWS) for t in routed), strict=True):
        wanted = experts(*part).double()
        difference += float((new(*part).double() - wanted).square().sum())
        energy += float(wanted.square().sum())
    return relative(difference, energy)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
