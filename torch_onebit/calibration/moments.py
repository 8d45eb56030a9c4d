"""What calibration knows of a layer: its inputs in the half-quantized model, and what to aim at."""

import torch
from torch import Tensor, nn

from torch_onebit.calibration.passes import Passes, run_to
from torch_onebit.calibration.solver import solving_device


class Moments:
    """Second moments of a layer's inputs x in the 1-bit model and of the outputs t it aims at.

    Sums are float64: of ``x x^T`` ``[k, k]``, ``t x^T`` ``[n, k]``, x ``[k]``, t and ``t^2``
    ``[n]``: 8 k (k + n) bytes, for one layer at a time.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.float64, device=solving_device(device))

        self.count = 0
        self.xx = zeros(columns, columns)
        self.tx = zeros(rows, columns)
        self.sum_x, self.sum_t, self.sum_tt = zeros(columns), zeros(rows), zeros(rows)

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add inputs ``[..., k]`` and the outputs ``[..., n]`` that are wanted for them."""
        x, t = (t.detach().flatten(0, -2).float() for t in (x, target))
        self.count += len(x)
        device = self.xx.device
        self.xx += (x.t() @ x).to(device)
        self.tx += (t.t() @ x).to(device)
        self.sum_x += x.sum(0).to(device)
        self.sum_t += t.sum(0).to(device)
        self.sum_tt += t.square().sum(0).to(device)

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean input ``[k]`` and target ``[n]``."""
        return self.sum_x / self.count, self.sum_t / self.count

    def second(self, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``E[x x^T]``, ``E[t x^T]`` and ``E[t^2]`` ``[n]``, about the means when centred."""
        mean_x, mean_t = self.means()
        if not centred:
            mean_x, mean_t = mean_x * 0, mean_t * 0
        return (
            self.xx / self.count - torch.outer(mean_x, mean_x),
            self.tx / self.count - torch.outer(mean_t, mean_x),
            self.sum_tt / self.count - mean_t.square(),
        )


def collect(
    reference: Passes, reference_layer: nn.Linear, model: Passes, layer: nn.Linear
) -> Moments:
    """Moments of a layer over batches; the model's layer sees what the layers before made of it.

    Target: the output of the float model. Where an output is added to a residual, and so comes out
    of the two models as ``y_0 + r_0`` and ``y + r``, it is ``y_0 + r_0 - r``: the layer makes up
    for the error of the residual too, as far as its input tells it.
    """
    moments = Moments(*layer.weight.shape, layer.weight.device)
    module_0, calls_0 = reference.reach(reference_layer)
    module, calls = model.reach(layer)
    for call_0, call in zip(calls_0, calls, strict=True):
        _, target, residual_0 = run_to(module_0, reference_layer, call_0)
        x, _, residual = run_to(module, layer, call)
        if residual is not None and residual_0 is not None:
            target = target + (residual_0 - residual)
        moments.add(x, target)
    return moments
