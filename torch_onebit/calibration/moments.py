"""Sums over batches: all that calibration keeps of a layer's inputs and of what it aims at.

Products are summed in float32 over ``ROWS`` inputs and then in float64. Inputs and targets are
taken less the mean of the first batch: a mean far from zero would cost float32 its digits. Where
the CPU has units that multiply bfloat16, which are three times as fast, many of them are rounded to
that: an error of 1e-3 each, at random, where damping is 1e-2 of all.
"""

import torch
from torch import Tensor

from torch_onebit.linear_algebra import narrow, solving_device

ROWS = 8192
COLUMNS = 256  # x x^T is symmetric: of blocks of so many columns those right of the diagonal


class _Sum:
    """A float64 sum of float32 products ``[rows, columns]``, 12 bytes a value."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self.recent = torch.zeros(rows, columns, device=device)
        self.count = 0

    def add(self, a: Tensor, b: Tensor, upper: bool = False) -> None:
        """``a^T b`` of a ``[m, rows]`` and b ``[m, columns]``; if upper, right of the diagonal."""
        if a.dtype == torch.bfloat16:
            torch.ops.onebit.add_products_(self.recent, a, b, upper)
        elif upper:
            for begin in range(0, len(self.recent), COLUMNS):
                part = self.recent[begin : begin + COLUMNS, begin:]
                part.addmm_(a[:, begin : begin + COLUMNS].t(), b[:, begin:])
        else:
            self.recent.addmm_(a.t(), b)
        self.count += len(a)
        if self.count >= ROWS:
            self.fold()

    def fold(self) -> Tensor:
        self.total += self.recent
        self.recent.zero_()
        self.count = 0
        return self.total


def _mean(t: Tensor) -> Tensor:
    return t.mean(0, dtype=torch.float64).float()


class InputMoments:
    """Of inputs x ``[k]`` in the 1-bit model: how many, their mean and ``E[x x^T]``."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.device = solving_device(device)
        self.count = 0
        self.shift = torch.zeros(columns, device=self.device)
        self.sum = torch.zeros(columns, dtype=torch.float64, device=self.device)
        self.square = _Sum(columns, columns, self.device)

    def add(self, x: Tensor) -> Tensor:
        """Add inputs ``[..., k]``; returns ``[m, k]``, them less the shift, for OutputMoments:
        float32 or bfloat16."""
        x = x.detach().reshape(-1, x.shape[-1]).to(self.device).float()
        if self.count == 0:
            self.shift = _mean(x)
        x = x - self.shift
        self.count += len(x)
        self.sum += x.sum(0)
        x = narrow(x)
        self.square.add(x, x, upper=True)
        return x

    def mean(self) -> Tensor:
        """``[k]``, float64."""
        return self.shift + self.sum / self.count

    def second(self, centred: bool) -> Tensor:
        """``E[x x^T]`` ``[k, k]``, float32, about the mean when centred."""
        right = (self.square.fold() / self.count).float().triu_()
        moments = right + right.triu(1).t()
        offset = (self.sum / self.count).float()  # of the mean from the shift
        moments.addr_(offset, offset, alpha=-1)
        return moments if centred else moments.addr_(*[self.mean().float()] * 2)


class OutputMoments:
    """Of the outputs t ``[n]`` that are wanted for inputs: their mean, ``E[t x^T]``, ``E[t^2]``."""

    def __init__(self, rows: int, inputs: InputMoments) -> None:
        self.inputs = inputs
        self.count = 0
        self.shift = torch.zeros(rows, device=inputs.device)
        self.sum = torch.zeros(rows, dtype=torch.float64, device=inputs.device)
        self.squares = torch.zeros(rows, dtype=torch.float64, device=inputs.device)
        self.cross = _Sum(rows, len(inputs.shift), inputs.device)

    def add(self, target: Tensor, x: Tensor) -> None:
        """Add targets ``[..., n]`` for inputs x as ``InputMoments.add`` returned them."""
        t = target.detach().reshape(-1, target.shape[-1]).to(self.inputs.device).float()
        if self.count == 0:
            self.shift = _mean(t)
        t = t - self.shift
        self.count += len(t)
        self.sum += t.sum(0)
        self.squares += t.square().sum(0)
        self.cross.add(t.to(x.dtype), x)

    def mean(self) -> Tensor:
        """``[n]``, float64."""
        return self.shift + self.sum / self.count

    def variance(self) -> Tensor:
        """``E[t^2]`` about the mean, ``[n]``."""
        return (self.squares / self.count - (self.sum / self.count).square()).clamp(min=0)

    def second(self, centred: bool) -> Tensor:
        """``E[t x^T]`` ``[n, k]``, float32, about the means when centred."""
        offsets = [(self.sum / self.count).float(), (self.inputs.sum / self.count).float()]
        moments = (self.cross.fold() / self.count).float().addr_(*offsets, alpha=-1)
        if centred:
            return moments
        return moments.addr_(self.mean().float(), self.inputs.mean().float())

    def finite(self) -> bool:
        return bool(self.squares.isfinite().all() and self.inputs.sum.isfinite().all())
