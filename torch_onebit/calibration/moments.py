"""Running a float model and its half-quantized copy side by side, up to one layer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class _Reached(Exception):
    """Stops a forward pass once the layer of interest has run."""


@torch.no_grad()
def run(model: nn.Module, batch: Any) -> Any:
    """model on one batch: a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def run_to(model: nn.Module, layer: nn.Module, batch: Any, seen: Callable[..., None]) -> None:
    """Run model on batch until layer has run; call ``seen(input, output)`` there."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen(args[0], output)
        raise _Reached

    handle = layer.register_forward_hook(hook)
    try:
        run(model, batch)
    except _Reached:
        pass
    finally:
        handle.remove()


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
    reference: nn.Module,
    reference_layer: nn.Linear,
    model: nn.Module,
    layer: nn.Linear,
    batches: Iterable[Any],
) -> Moments:
    """Moments of a layer over batches; the model's layer sees what the layers before made of it."""
    moments = Moments(*layer.weight.shape, layer.weight.device)
    for batch in batches:
        seen: list[tuple[Tensor, Tensor]] = []

        def remember(x: Tensor, y: Tensor, seen: list = seen) -> None:
            seen.append((x, y))

        run_to(reference, reference_layer, batch, remember)
        run_to(model, layer, batch, remember)
        (x_0, y_0), (x_q, _) = seen
        moments.add(x_0, y_0, x_q)
    return moments
