"""What calibration knows of a layer's inputs, in a float model and in its half-quantized copy."""

import torch
from torch import Tensor, nn

from torch_onebit.calibration.passes import Passes, run_to


class Moments:
    """Second moments of a layer's inputs in two models, the float one (0) and the 1-bit one (q).

    Sums are float64: of ``x_q x_q^T`` and ``x_0 x_q^T`` ``[k, k]``, of both inputs ``[k]``, and of
    the float outputs and their squares ``[n]``: 16 k^2 bytes, for one layer at a time.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.float64, device=device)

        self.count = 0
        self.qq = zeros(columns, columns)
        self.cross = zeros(columns, columns)  # x_0 x_q^T
        self.sum_0, self.sum_q = zeros(columns), zeros(columns)
        self.sum_y, self.sum_yy = zeros(rows), zeros(rows)

    def add(self, x_0: Tensor, y_0: Tensor, x_q: Tensor) -> None:
        """Add inputs ``[..., k]`` of both models and the float output ``[..., n]``."""
        x_0, y_0, x_q = (t.detach().flatten(0, -2).float() for t in (x_0, y_0, x_q))
        self.count += len(x_0)
        self.qq += x_q.t() @ x_q
        self.cross += x_0.t() @ x_q
        self.sum_0 += x_0.sum(0)
        self.sum_q += x_q.sum(0)
        self.sum_y += y_0.sum(0)
        self.sum_yy += y_0.square().sum(0)

    def means(self, centred: bool) -> tuple[Tensor, Tensor]:
        """Mean inputs of both models ``[k]``; zeros when not centred."""
        mean_0, mean_q = self.sum_0 / self.count, self.sum_q / self.count
        return (mean_0, mean_q) if centred else (mean_0 * 0, mean_q * 0)

    def second(self, centred: bool) -> tuple[Tensor, Tensor]:
        """``H = E[x_q x_q^T]`` and ``C = E[x_0 x_q^T]``, about the means when centred."""
        mean_0, mean_q = self.means(centred)
        h = self.qq / self.count - torch.outer(mean_q, mean_q)
        c = self.cross / self.count - torch.outer(mean_0, mean_q)
        return h, c

    def output_energy(self, bias: Tensor | None, centred: bool) -> float:
        """Sum over outputs of ``E[(W x_0)^2]``, about the mean when centred."""
        mean = self.sum_y / self.count
        shift = mean if centred else (0 * mean if bias is None else bias.double())
        energy = self.sum_yy / self.count - 2 * shift * mean + shift * shift
        return float(energy.sum())


def collect(
    reference: Passes, reference_layer: nn.Linear, model: Passes, layer: nn.Linear
) -> Moments:
    """Moments of a layer over batches; the model's layer sees what the layers before made of it."""
    moments = Moments(*layer.weight.shape, layer.weight.device)
    module_0, calls_0 = reference.reach(reference_layer)
    module_q, calls_q = model.reach(layer)
    for call_0, call_q in zip(calls_0, calls_q, strict=True):
        seen: list[tuple[Tensor, Tensor]] = []

        def remember(x: Tensor, y: Tensor, seen: list = seen) -> None:
            seen.append((x, y))

        run_to(module_0, reference_layer, call_0, remember)
        run_to(module_q, layer, call_q, remember)
        (x_0, y_0), (x_q, _) = seen
        moments.add(x_0, y_0, x_q)
    return moments
