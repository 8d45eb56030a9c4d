"""One weight matrix, calibrated: bits and levels that keep the layer's outputs, not its weights.

Minimises ``tr((w - w_hat) H (w - w_hat)^T)`` with H the second moments of the layer's inputs, by
turns:

    refit    the bits given, all scales and biases of a row are a least-squares problem in
             2 * groups unknowns
    descend  the levels given, flip every bit whose flip lowers the loss, column by column

Both steps only lower the loss. Rows are independent: they are worked on in chunks of bounded
memory. For n x k weights a round costs about ``3/2 n k^2`` multiply-adds of matrix products, ``n (2
k / group_size)^3`` for the refit's solves and ``k`` per bit that flips.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_onebit.checks import check_count, check_number
from torch_onebit.linear_algebra import damped, not_finite, solving_device, without_autocast
from torch_onebit.ops import quantize_levels
from torch_onebit.packing import pack_bits, unpack_bits
from torch_onebit.padding import fill, missing

SYSTEM_VALUES = 1 << 24  # of all least-squares systems of a chunk: 128 MB


@dataclass(frozen=True)
class CalibrationOptions:
    """How hard to try. Late sweeps are cheap, as few bits flip in them; rounds are not.

    rounds: refits, each followed by a descent; it stops earlier when no bit flips.
    sweeps: passes over the columns per descent.
    damping: added to the diagonal of H, in units of its mean; 3000 times as much where a layer is
        in a loop of the model.
    """

    rounds: int = 3
    sweeps: int = 6
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)
        check_count("sweeps", self.sweeps)
        check_number("damping", self.damping, least=0)


@without_autocast
def quantize_calibrated(
    w: Tensor,
    moments: Tensor,
    group_size: int = 128,
    *,
    symmetric: bool = False,
    options: CalibrationOptions | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize to 1 bit so that outputs ``x @ w.T`` change least for inputs with these moments.

    Deterministic, also in the number of threads to float rounding.

    Args:
        w: ``[n, k]``; where ``group_size`` does not divide k, the last group is filled up.
        moments: ``[k, k]``, mean of ``x x^T`` over calibration inputs.
        group_size: 32, 64 or 128.
        symmetric: weights of ``±scale / 2``: no biases.
    Returns:
        packed ``[n, k // 32]`` int32, scales and biases ``[n, k // group_size]`` in the dtype of w,
        k rounded up to whole groups; biases are None in the symmetric form.
    Raises:
        ValueError: moments of another shape, NaN or Inf, or a w that the format does not allow.
    """
    options = options or CalibrationOptions()
    if w.dim() != 2 or moments.shape != (w.shape[1], w.shape[1]):
        raise ValueError(
            f"moments must be a square of the columns of w {list(w.shape)}, "
            f"got {list(moments.shape)}"
        )
    for name, values in (("w", w), ("moments", moments)):
        if not torch.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got {not_finite(values)}")
    device, dtype = w.device, w.dtype
    w, moments = w.to(solving_device(device)).float(), moments.to(solving_device(device)).double()
    lacking = missing(w.shape[1], group_size)
    if lacking:  # columns of no input but the damping, near those they repeat
        w, moments = fill(w, group_size), F.pad(moments, (0, lacking, 0, lacking))
    h = damped(moments, options.damping).float()
    bits, scales, biases = solve(w, w @ h, h, group_size, symmetric, options)
    packed, scales = pack_bits(bits).to(device), scales.to(device, dtype)
    return packed, scales, None if symmetric else biases.to(device, dtype)


@without_autocast
def solve(
    start: Tensor,
    wanted: Tensor,
    h: Tensor,
    group_size: int,
    symmetric: bool,
    options: CalibrationOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bits ``[n, k]``, scales and biases ``[n, groups]`` of little ``tr(w_hat h w_hat^T) -
    2 tr(wanted w_hat^T)``.

    Args:
        start: ``[n, k]``, float32, near the real-valued minimum ``wanted h^-1``.
        wanted: ``[n, k]``, float32.
        h: ``[k, k]``, float32.
    """
    n, k = start.shape
    groups = k // group_size
    if not n * k:
        levels = start.new_empty(n, groups)
        return start.new_empty(n, k, dtype=torch.bool), levels, levels.clone()
    chunk = max(32, min(1024, SYSTEM_VALUES // (2 * groups) ** 2))
    parts = [
        _solve_rows(*rows, h, group_size, symmetric, options)
        for rows in zip(start.split(chunk), wanted.split(chunk), strict=True)
    ]
    bits, scales, biases = (torch.cat(part) for part in zip(*parts, strict=True))
    return bits, scales, biases


def _solve_rows(
    start: Tensor,
    wanted: Tensor,
    h: Tensor,
    group_size: int,
    symmetric: bool,
    options: CalibrationOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    rule = "sign" if symmetric else "optimal"
    bits = unpack_bits(quantize_levels(start, rule, group_size)[0])
    for _ in range(options.rounds):
        scales, biases = _refit(wanted, h, bits, group_size, symmetric)
        if not _descend(wanted, h, bits, scales, biases, group_size, options.sweeps):
            return bits, scales, biases
    return bits, *_refit(wanted, h, bits, group_size, symmetric)


def _by_group(t: Tensor, group_size: int) -> Tensor:
    return t.unflatten(-1, (-1, group_size)).sum(-1)


def _refit(
    wanted: Tensor, h: Tensor, bits: Tensor, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The best scales and biases ``[n, groups]`` for bits ``[n, k]``, for what is ``wanted``.

    With columns ``bit`` and ``1`` per group the normal equations are
    ``[[A, B], [B^T, C]] [scale, bias] = [r, s]``; sums are float32, the solve float64.
    """
    n, k = bits.shape
    groups = k // group_size
    signs = bits.float() * 2 - 1 if symmetric else bits.float()
    a = torch.empty(n, groups, groups, device=h.device)
    for p in range(groups):  # A is symmetric: the part right of the diagonal, mirrored
        columns = slice(p * group_size, (p + 1) * group_size)
        product = signs[:, columns] @ h[columns, columns.start :]
        right = _by_group(product.mul_(signs[:, columns.start :]), group_size)
        a[:, p, p:] = right
        a[:, p:, p] = right
    r = _by_group(wanted * signs, group_size)
    if symmetric:
        amplitude = _least(a.double(), r.double())
        return 2 * amplitude, -amplitude
    h_groups = _by_group(h, group_size)  # [k, groups]
    b = torch.stack(
        [
            columns @ h_groups[p * group_size : (p + 1) * group_size]
            for p, columns in enumerate(signs.split(group_size, dim=1))
        ],
        dim=1,
    )
    c = h_groups.unflatten(0, (groups, group_size)).sum(1).expand(n, -1, -1)
    system = torch.cat([torch.cat([a, b], 2), torch.cat([b.transpose(1, 2), c], 2)], 1)
    levels = _least(system.double(), torch.cat([r, _by_group(wanted, group_size)], 1).double())
    return levels[:, :groups], levels[:, groups:]


def _least(system: Tensor, right: Tensor) -> Tensor:
    # A group whose bits are all equal makes the system singular: the ridge picks its smallest
    # answer.
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal += 1e-7 * diagonal.mean()
    return torch.linalg.solve(system, right).float()


def _descend(
    wanted: Tensor,
    h: Tensor,
    bits: Tensor,
    scales: Tensor,
    biases: Tensor,
    group_size: int,
    sweeps: int,
) -> bool:
    """Flip bits ``[n, k]`` in place while that lowers the loss. Returns whether any flipped."""
    w_hat = scales.repeat_interleave(group_size, 1) * bits + biases.repeat_interleave(group_size, 1)
    error = torch.addmm(wanted, w_hat, h, alpha=-1)
    return bool(torch.ops.onebit.descend_(bits, error, scales, h, sweeps, group_size).any())
