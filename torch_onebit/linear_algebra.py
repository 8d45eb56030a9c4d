"""Float64 and bfloat16 where they pay, and factors that always exist."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def without_autocast(solver: Callable[..., Any]) -> Callable[..., Any]:
    """solver, whose first argument is a tensor or a layer, in the dtypes it asks for: autocast is
    for the model that is calibrated under it."""

    @functools.wraps(solver)
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        device = getattr(first, "weight", first).device
        with torch.autocast(solving_device(device).type, enabled=False):
            return solver(first, *args, **kwargs)

    return run


def solving_device(device: torch.device) -> torch.device:
    """Where sums and solves in float64 run: there, or on the CPU for MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def not_finite(t: Tensor) -> str:
    """What makes t not finite."""
    return "NaN" if t.isnan().any() else "Inf"


def damping_of(moments: Tensor, damping: float) -> float:
    """``damping`` times the mean diagonal of moments ``[k, k]``; 1 when all inputs are dead."""
    level = damping * float(moments.diagonal().mean()) if len(moments) else 0.0
    return level if level > 0 else 1.0


def damped(moments: Tensor, damping: float) -> Tensor:
    """moments ``[k, k]`` plus their damping on the diagonal; a dead input stays harmless."""
    result = moments.clone()
    result.diagonal().add_(damping_of(moments, damping))
    return result


def cholesky(h: Tensor) -> Tensor:
    """The lower factor of h ``[k, k]``, symmetric and without negative eigenvalues but for
    rounding; where that leaves it singular, of h plus the least ridge that helps."""
    ridge = torch.finfo(h.dtype).eps * damping_of(h, 1.0)
    root, failed = torch.linalg.cholesky_ex(h)
    while failed:
        root, failed = torch.linalg.cholesky_ex(h + ridge * torch.eye(len(h)).to(h))
        ridge *= 10
    return root


def narrow(x: Tensor) -> Tensor:
    """x ``[m, ...]``, float32, as bfloat16 if it is worth it: rows enough, and units for it."""
    few = len(x) < 256
    fast = x.device.type == "cpu" and torch.ops.onebit.has_matrix_units()
    return x.bfloat16() if fast and not few and x.dtype == torch.float32 else x
