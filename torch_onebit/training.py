"""Helpers for training: distillation, frozen bits with trainable levels, LoRA."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_onebit.checks import check_callable, check_count, check_kind, check_model
from torch_onebit.nn import OneBitLinear, OneBitModule
from torch_onebit.surgery import FilterFn, layer_options, places


class Distillation(nn.Module):
    """Cross entropy of the targets mixed with the divergence from a teacher's distribution.

    ``(1 - weight) * cross_entropy(logits, targets)
    + weight * temperature**2 * KL(teacher || student)``, both distributions at the temperature.

    Args:
        teacher: a model, called without gradient in eval mode and kept out of ``parameters()``.
        weight: of the teacher, 0 to 1.
        temperature: above 0; softens both distributions.
    Raises:
        ValueError: a weight or temperature out of its range.
    """

    def __init__(
        self, teacher: Callable[..., Tensor], *, weight: float = 0.5, temperature: float = 1.0
    ) -> None:
        super().__init__()
        check_callable("teacher", teacher)
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be between 0 and 1, got {weight}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
        if isinstance(teacher, nn.Module):
            teacher.eval()
        self._teacher = [teacher]  # in a list: not a submodule, nothing of it is trained or saved
        self.weight = weight
        self.temperature = temperature

    def forward(self, logits: Tensor, targets: Tensor, *inputs: Any) -> Tensor:
        """Mean loss in nats.

        Args:
            logits: ``[..., classes]`` of the student.
            targets: ``[...]``, int64; -100 is ignored.
            inputs: what the teacher is called with.
        """
        with torch.no_grad():
            teacher = self._teacher[0](*inputs)
        return distillation_loss(
            logits, teacher, targets, weight=self.weight, temperature=self.temperature
        )


def distillation_loss(
    logits: Tensor, teacher: Tensor, targets: Tensor, *, weight: float, temperature: float = 1.0
) -> Tensor:
    """The loss of ``Distillation`` from logits of both models, ``[..., classes]``, in nats."""
    if teacher.shape != logits.shape:
        raise ValueError(
            f"teacher must give logits {list(logits.shape)} as the student, "
            f"got {list(teacher.shape)}"
        )
    student, teacher, targets = logits.flatten(0, -2), teacher.flatten(0, -2), targets.flatten()
    kept = targets != -100
    hard = F.cross_entropy(student.float(), targets)
    student = F.log_softmax(student.float() / temperature, -1)
    teacher = F.log_softmax(teacher.float() / temperature, -1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    soft = (divergence * kept).sum() / kept.sum()
    return (1 - weight) * hard + weight * temperature**2 * soft


def thaw_levels_(model: nn.Module, requires_grad: bool = True) -> nn.Module:
    """Make scales and biases of every 1-bit layer trainable, in place; the bits stay frozen.

    Their gradients are exact and computed from packed weights. Returns model.
    """
    check_model(model)
    for module in model.modules():
        if isinstance(module, OneBitModule):
            for levels in (module.scales, module.biases):
                if levels is not None:
                    levels.requires_grad_(requires_grad)
    return model


class LoRALinear(nn.Module):
    """A 1-bit linear layer plus a trainable low-rank product: ``base(x) + scaling * (x A^T) B^T``.

    Args:
        base: a packed layer; its bits stay as they are.
        rank: r of A ``[r, k]`` and B ``[n, r]``; B starts at zero, so nothing changes at first.
        alpha: ``scaling = alpha / rank``; ``rank`` without it.
    Raises:
        ValueError: a rank below 1, an alpha that is no finite number, or another kind of layer.
    """

    def __init__(self, base: OneBitLinear, *, rank: int = 8, alpha: float | None = None) -> None:
        super().__init__()
        check_kind("base", base, OneBitLinear, "a OneBitLinear")
        _check_lora(rank, alpha)
        self.base = base
        self.scaling = (rank if alpha is None else alpha) / rank
        like = {"device": base.scales.device, "dtype": base.scales.dtype}
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_a, self.lora_b
        if not torch.is_autocast_enabled(x.device.type):
            a, b = a.to(x.dtype), b.to(x.dtype)
        return self.base(x) + self.scaling * F.linear(F.linear(x, a), b)

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_a)}, scaling={self.scaling:g}"


def _check_lora(rank: int, alpha: float | None) -> None:
    check_count("rank", rank, 1)
    if alpha is not None and not (isinstance(alpha, int | float) and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}")


def add_lora_(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float | None = None,
    filter_fn: FilterFn | None = None,
) -> nn.Module:
    """Put a trainable low-rank product beside every OneBitLinear the filter accepts, in place.

    Args:
        model: the model; not itself a OneBitLinear.
        rank, alpha: as in ``LoRALinear``.
        filter_fn: ``filter_fn(module, name)`` is false to leave the layer, true to take it, or a
            dict of ``rank`` and ``alpha`` for this layer.
    Returns:
        model.
    Raises:
        ValueError: a rank or alpha that is not allowed, or a model that is itself a layer (use
            ``LoRALinear``).
    """
    if isinstance(model, OneBitLinear):
        raise ValueError(
            "model must contain the layers to swap, got OneBitLinear itself: use LoRALinear"
        )
    defaults = {"rank": rank, "alpha": alpha}
    chosen = []  # all decided before any is swapped
    for name, parent, attribute, layer in places(model, lambda m: isinstance(m, OneBitLinear)):
        options = layer_options(filter_fn, layer, name, defaults)
        if options is not None and not isinstance(parent, LoRALinear):
            _check_lora(**options)
            chosen.append((parent, attribute, layer, options))
    swapped: dict[int, LoRALinear] = {}
    for parent, attribute, layer, options in chosen:
        if id(layer) not in swapped:
            swapped[id(layer)] = LoRALinear(layer, **options)
        setattr(parent, attribute, swapped[id(layer)])
    return model


def thaw_lora_(model: nn.Module, requires_grad: bool = True) -> nn.Module:
    """Make the low-rank products of a model trainable, in place, after it was frozen as a whole.

    Returns model.
    """
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_a.requires_grad_(requires_grad)
            module.lora_b.requires_grad_(requires_grad)
    return model
