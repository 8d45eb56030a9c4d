"""Make inputs, and hold results to the accuracy rule."""

import numpy as np
import reference
import torch
from torch import Tensor


def make_weights(
    *rows_and_columns: int,
    group_size: int = 128,
    dtype: torch.dtype = torch.float32,
    symmetric: bool = False,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random packed weights ``[..., rows, columns]`` whose two levels are of either sign."""
    *lead, columns = rows_and_columns
    packed = torch.randint(-(2**31), 2**31, (*lead, columns // 32)).to(torch.int32)
    scales = torch.rand(*lead, columns // group_size) + 0.5
    biases = -scales * (0.3 + 0.4 * torch.rand_like(scales))
    levels = [scales.to(device, dtype), None if symmetric else biases.to(device, dtype)]
    return (packed.to(device), *levels)


def to_numpy(t: Tensor | None) -> np.ndarray | None:
    """Floats as float64, packed words as uint32, indices as they are."""
    if t is None:
        return None
    t = t.detach().cpu()
    if t.dtype in (torch.int32, torch.uint32):
        return t.view(torch.int32).numpy().view(np.uint32)
    return t.double().numpy() if t.is_floating_point() else t.numpy()


def torch_qmm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor | None,
    group_size: int,
    transpose: bool = True,
) -> Tensor:
    """Plain torch: dequantize, then matmul, in the dtype of x."""
    w = torch.ops.onebit.dequantize(packed, scales, biases, group_size).to(x.dtype)
    return torch.matmul(x, w.mT if transpose else w)


def relative_error(actual: Tensor, expected: np.ndarray) -> float:
    """Relative L2 distance."""
    difference = np.linalg.norm(actual.detach().cpu().double().numpy() - expected)
    return float(difference / max(np.linalg.norm(expected), 1e-300))


def assert_as_accurate_as_torch(actual: Tensor, plain: Tensor, expected: np.ndarray) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype.

    A floor of half a unit in the last place keeps products that torch gets exactly right (one term,
    powers of two) from asking for a perfect result; of one unit for a single output, which torch
    may round right by luck. The reference is itself float64, whose floor is its rounding.
    """
    assert actual.shape == plain.shape
    assert actual.dtype == plain.dtype
    assert torch.isfinite(actual).all()
    units = 8 if actual.dtype == torch.float64 else 1 if actual.numel() == 1 else 0.5
    floor = units * torch.finfo(actual.dtype).eps
    assert relative_error(actual, expected) <= max(2 * relative_error(plain, expected), floor)


def assert_qmm(x, packed, scales, biases, group_size, transpose=True):
    """qmm obeys the accuracy rule on these arguments."""
    args = (x, packed, scales, biases, group_size, transpose)
    expected = reference.qmm(
        to_numpy(x), to_numpy(packed), to_numpy(scales), to_numpy(biases), group_size, transpose
    )
    assert_as_accurate_as_torch(torch.ops.onebit.qmm(*args), torch_qmm(*args), expected)
