"""Distillation: training against the distribution of another model."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_onebit.checks import check_callable


class Distillation(nn.Module):
    """Cross entropy of the targets mixed with the divergence from a teacher's distribution.

    ``(1 - weight) * cross_entropy(logits, targets)
    + weight * temperature**2 * KL(teacher || student)``, both distributions at the temperature.

    The teacher goes along with ``.to()`` and the like, and is neither trained nor saved: it is kept
    out of ``parameters()`` and ``state_dict()``. Make it before the student is changed:
    ``teacher = copy.deepcopy(model)``.

    Args:
        teacher: a model, called without gradient in eval mode.
        weight: of the teacher, 0 to 1.
        temperature: above 0; softens both distributions.
    Raises:
        ValueError: a weight or temperature out of its range.
        TypeError: a teacher that cannot be called.
    """

    def __init__(
        self, teacher: Callable[..., Any], *, weight: float = 0.5, temperature: float = 1.0
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
        self._apart = False  # known to share nothing with the student
        self.weight = weight
        self.temperature = temperature

    def forward(self, logits: Any, targets: Tensor, *inputs: Any, **keywords: Any) -> Tensor:
        """Mean loss in nats.

        Args:
            logits: ``[..., classes]`` of the student, or what its model returned: an object or dict
                with ``logits``.
            targets: ``[...]``, int64; -100 is ignored.
            inputs, keywords: what the teacher is called with; it may return such an object too.
        Raises:
            ValueError: logits of another shape than the teacher's, or a teacher whose parameters
                the student trains (seen at the first call).
            TypeError: a result that has no logits.
        """
        student = _logits("logits", logits)
        teacher = self._teacher[0]
        if not self._apart and isinstance(teacher, nn.Module) and student.requires_grad:
            _check_apart(teacher, student)
            self._apart = True
        with torch.no_grad():
            wanted = _logits("teacher's result", teacher(*inputs, **keywords))
        return distillation_loss(
            student, wanted, targets, weight=self.weight, temperature=self.temperature
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distillation":
        if isinstance(self._teacher[0], nn.Module):
            self._teacher[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)


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


def _logits(name: str, result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    found = result.get("logits") if isinstance(result, Mapping) else None
    found = getattr(result, "logits", None) if found is None else found
    if not isinstance(found, Tensor):
        raise TypeError(f"{name} must be a tensor or have logits, got {type(result).__name__}")
    return found


def _check_apart(teacher: nn.Module, student: Tensor) -> None:
    """Raise ValueError when the graph behind the student's logits ends in teacher's parameters."""
    own = {id(p) for p in teacher.parameters()}
    waiting, seen, shared = [student.grad_fn], set(), 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        shared += id(getattr(node, "variable", None)) in own
        waiting += [following for following, _ in node.next_functions]
    if shared:
        raise ValueError(
            "teacher must share no parameters that train with the student (take "
            f"copy.deepcopy(model) before changing it), got {shared} shared"
        )
