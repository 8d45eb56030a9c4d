"""One call of every kernel, small: a program to run under compute-sanitizer."""

import itertools
from functools import partial

import torch

from torch_onebit import ops

# Rows of x that take each way on any device: planes, few rows, tiles, split sums, dense.
ROWS = (1, 3, 7, 20, 64, 100, 130, 1030)


def weights(*sizes: int, group_size: int, dtype: torch.dtype, symmetric: bool):
    packed = torch.randint(-(2**31), 2**31, (*sizes[:-1], sizes[-1] // 32), device="cuda")
    scales = torch.rand(*sizes[:-1], sizes[-1] // group_size, device="cuda") + 0.5
    biases = None if symmetric else (scales * -0.4).to(dtype)
    return packed.to(torch.int32), scales.to(dtype), biases


def main() -> None:
    torch.manual_seed(0)
    forms = itertools.product((128, 64, 32), (torch.bfloat16, torch.float32))
    for i, (group_size, dtype) in enumerate(forms):
        make = partial(weights, group_size=group_size, dtype=dtype, symmetric=i % 2 == 1)
        for k in (2048, 640):  # of whole blocks, and not
            w = make(70, k)
            for m in ROWS:
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                x[:, 5] = 2.0**14  # a block that no fixed point holds
                ops.qmm(x, *w, group_size)
        y = torch.randn(9, 70, device="cuda", dtype=dtype)
        ops.affine_grad(
            y, torch.randn(9, k, device="cuda", dtype=dtype), w[0], None, None, group_size
        )
        chosen = torch.tensor([0, 2, 3, 9], device="cuda")  # the last is no matrix
        for transpose, columns in ((True, 256), (False, 64)):
            x = torch.randn(4, 3, columns, device="cuda", dtype=dtype)
            experts = make(4, 64, 256)
            ops.gather_qmm(
                x, *experts, rhs_indices=chosen, group_size=group_size, transpose=transpose
            )
        dense = torch.randn(33, 256, device="cuda").to(dtype)
        packed = ops.quantize(dense, group_size)
        ops.dequantize(*packed, group_size)
        ops.embedding(torch.tensor([0, 32, 33], device="cuda"), *packed, group_size)
        for rule in ops.RULES:
            importance = None if rule in ("minmax", "mean") else torch.rand(256, device="cuda")
            ops.quantize_levels(dense, rule, group_size, importance)
            latent = dense.clone().requires_grad_()
            ops.fake_quantize(latent, rule, group_size).sum().backward()
        free = [t.clone().requires_grad_() for t in (dense, *packed[1:])]
        ops.fake_quantize_affine(*free, group_size).sum().backward()
    moments = torch.randn(256, 256, device="cuda")
    bits, error = torch.rand(33, 256, device="cuda") > 0.5, torch.randn(33, 256, device="cuda")
    scales = torch.rand(33, 4, device="cuda")
    torch.ops.onebit.flip_bits_(bits, error, scales, moments @ moments.T, 64, 192, 64)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
