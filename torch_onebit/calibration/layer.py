"""One layer, calibrated: from the moments of its inputs and targets to its 1-bit form.

With x the inputs of the layer in the model whose earlier layers are 1-bit already and t what it
should give: choose w_hat so that ``w_hat x`` comes close to t. With ``H = E[x x^T]`` and ``C =
E[t x^T]`` that is to minimise ``tr(w_hat H w_hat^T) - 2 tr(C w_hat^T)``. Both are damped on the
same side: ``H + d``, ``C + w d``, so that inputs that agree leave w as it is.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_onebit import ops
from torch_onebit.calibration.moments import InputMoments, OutputMoments
from torch_onebit.float_layers import matrix
from torch_onebit.linear_algebra import (
    cholesky,
    damping_of,
    solving_device,
    without_autocast,
)
from torch_onebit.methods import quantize_weight
from torch_onebit.packing import pack_bits
from torch_onebit.padding import fill, missing
from torch_onebit.solver import CalibrationOptions, solve


@dataclass
class Result:
    """What one layer became; what a checkpoint keeps."""

    packed: Tensor | None
    scales: Tensor | None
    biases: Tensor | None
    weight_error: float
    output_error: float | None = None
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    stacks: dict[str, tuple[Tensor | None, ...]] = field(default_factory=dict)  # of experts instead
    note: str = ""
    seconds: float = 0.0


class Normal:
    """H of some inputs and the factor of ``H + damping``, for all layers that are given them."""

    def __init__(self, inputs: InputMoments, centred: bool, damping: float) -> None:
        self.h = inputs.second(centred)
        self.damping = damping_of(self.h, damping)
        self.damped = self.h.clone()
        self.damped.diagonal().add_(self.damping)
        self.root = cholesky(self.damped)


@torch.no_grad()
def without_data(layer: nn.Module, group_size: int, symmetric: bool, note: str) -> Result:
    """By method "optimal"."""
    w = matrix(layer)
    levels = quantize_weight(w, "optimal", group_size, symmetric=symmetric)
    w_hat = ops.dequantize(*levels, group_size)[:, : w.shape[1]]
    return Result(*levels, weight_error=relative(_energy(w_hat - w), _energy(w)), note=note)


@torch.no_grad()
@without_autocast
def calibrate_layer(
    layer: nn.Linear,
    normal: Normal,
    outputs: OutputMoments,
    group_size: int,
    symmetric: bool,
    options: CalibrationOptions,
    rank: int,
) -> Result:
    """Calibrate an nn.Linear; where it has a bias, normal is about the mean.

    ``output_error`` is ``E|y - t|^2 / E|t|^2`` of its outputs y on these inputs: 0 when they are
    right, 1 when they might as well be 0, infinite when t is 0 and y is not.
    """
    home, bias = layer.weight.device, layer.bias
    w = matrix(layer).to(normal.h.device)
    c = outputs.second(centred=bias is not None)
    wanted = torch.add(c, w.float(), alpha=normal.damping)
    exact = torch.cholesky_solve(wanted.t(), normal.root).t()
    filled_up = filled(exact, wanted, normal.damped, normal.damping, group_size)
    bits, scales, biases = solve(*filled_up, group_size, symmetric, options)
    levels = (pack_bits(bits), scales.to(w.dtype), None if symmetric else biases.to(w.dtype))
    w_hat = ops.dequantize(*levels, group_size)[:, : w.shape[1]].float()
    lora_a = lora_b = None
    if rank:
        lora_a, lora_b = _low_rank((exact - w_hat).double(), normal.root.double(), rank)
        lora_a, lora_b = lora_a.to(w.dtype), lora_b.to(w.dtype)
        w_hat = w_hat + lora_b.float() @ lora_a.float()
    offset = outputs.mean() - w_hat.double() @ outputs.inputs.mean()
    if bias is not None:
        bias = offset.to(bias.dtype)
        offset = offset - bias.double()
    if bias is None:
        h, c = outputs.inputs.second(centred=True), outputs.second(centred=True)
    else:
        h = normal.h
    # E|w_hat x - t|^2 about the means, row by row: not below 0 but for rounding
    spread = torch.addmm(c, w_hat, h, beta=-2).mul_(w_hat).sum(1, dtype=torch.float64)
    spread += outputs.variance()
    difference = float(spread.clamp(min=0).sum() + offset.square().sum())
    energy = float(outputs.variance().sum() + outputs.mean().square().sum())

    def back(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(home)

    return Result(
        *(back(t) for t in levels),
        weight_error=relative(_energy(w_hat - w), _energy(w)),
        output_error=relative(difference, energy),
        bias=back(bias),
        lora_a=back(lora_a),
        lora_b=back(lora_b),
    )


def filled(
    start: Tensor, wanted: Tensor, h: Tensor, damping: float, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """start, wanted and h of ``solve`` with the last group filled up, by columns of no input: what
    there is of them is the damping, which keeps their weights near those they repeat."""
    lacking = missing(len(h), group_size)
    if not lacking:
        return start, wanted, h
    whole = fill(start, group_size)
    h = F.pad(h, (0, lacking, 0, lacking))
    h.diagonal()[-lacking:] = float(damping)
    return whole, torch.cat([wanted, whole[:, -lacking:] * damping], 1).to(wanted.dtype), h


def _low_rank(error: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """a ``[r, k]``, b ``[n, r]`` of least ``|(error - b a) root|``, nearly; root is triangular.

    By subspace iteration: ``n k (r + 8)`` multiply-adds 16 times, where an SVD would take longer
    than the bits. Rows of a are as long as those a ``LoRALinear`` starts with.
    """
    rank = min(rank, *error.shape)
    scaled = error @ root
    generator = torch.Generator().manual_seed(0)  # any start will do
    start = torch.randn(len(root), rank + 8, generator=generator, dtype=root.dtype)
    basis = start.to(root.device)
    for _ in range(8):
        basis = torch.linalg.qr(scaled.t() @ (scaled @ basis))[0]
    _, _, inner = torch.linalg.svd(scaled @ basis, full_matrices=False)
    v = basis @ inner[:rank].t()  # the leading right singular vectors
    a = torch.linalg.solve_triangular(root.t(), v, upper=True).t()
    length = a.norm(dim=1, keepdim=True) * 3**0.5
    return a / length, scaled @ v * length.t()


def relative(difference: float, energy: float) -> float:
    """A squared error, relative; infinite where there should be nothing and is something."""
    if energy > 0:
        return difference / energy
    return math.inf if difference > 0 else 0.0


def _energy(t: Tensor) -> float:
    return float(t.detach().to(solving_device(t.device)).double().square().sum())
