"""Writes a 1-bit model as an AOTInductor package, and prints what it answers to main.cpp's input.

python examples/aoti/package.py model.pt2
"""

import sys

import torch
from torch import Tensor, nn

import torch_onebit


def tokens() -> Tensor:
    """The input of main.cpp: 3 rows of 2."""
    return torch.arange(6).reshape(3, 2)


def package(path: str) -> nn.Module:
    """Write a small 1-bit model, for any number of rows, to path; returns the model."""
    model = nn.Sequential(nn.Embedding(16, 128), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 4))
    torch_onebit.quantize_(model.eval())
    rows = torch.export.Dim("rows", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(
            model, (torch.zeros(2, 2).long(),), dynamic_shapes=({0: rows},)
        )
        torch._inductor.aoti_compile_and_package(exported, package_path=path)
    return model


def lines(y: Tensor) -> list[str]:
    """As main.cpp prints: one line per token."""
    return [" ".join(f"{value:.4f}" for value in row) for row in y.flatten(0, 1).tolist()]


if __name__ == "__main__":
    print("\n".join(lines(package(sys.argv[1])(tokens()))))
