"""A network to 1 bit in five steps: quantize, calibrate, train the levels, save, load.

    python examples/quickstart.py

The data are made up: which of ten random directions a vector lies nearest to.
"""

import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import torch_onebit


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)
    )


def train(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        some = torch.arange(step * 128, (step + 1) * 128) % len(x)
        loss = F.cross_entropy(model(x[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    directions = torch.randn(10, 64)
    x = torch.randn(6000, 64)
    labels = (x @ directions.T).argmax(-1)
    x_test, labels_test, x, labels = x[5000:], labels[5000:], x[:5000], labels[:5000]

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return (model(x_test).argmax(-1) == labels_test).float().mean().item()

    model = network()
    train(model, x, labels, 600, 1e-3)
    print(f"float                  {accuracy(model):.1%} right")

    # The head is small and costs most: it stays float.
    quantized = torch_onebit.quantize_(copy.deepcopy(model), group_size=64, skip=["4"])
    print(f"1 bit                  {accuracy(quantized):.1%}")

    calibrated = copy.deepcopy(model)
    torch_onebit.calibrate_(calibrated, x[:1024].split(128), group_size=64, skip=["4"])
    print(f"1 bit, calibrated      {accuracy(calibrated):.1%}")

    torch_onebit.thaw_levels_(calibrated)
    train(calibrated, x, labels, 200, 3e-4)
    print(f"1 bit, levels trained  {accuracy(calibrated):.1%}")
    print(torch_onebit.report(calibrated))

    with tempfile.TemporaryDirectory() as folder:
        torch.save(calibrated.state_dict(), Path(folder) / "model.pt")
        loaded = torch_onebit.quantize_(network(), group_size=64, skip=["4"])
        loaded.load_state_dict(torch.load(Path(folder) / "model.pt"))
    assert torch.equal(loaded(x_test), calibrated(x_test))
    print("saved and loaded, bit for bit")


if __name__ == "__main__":
    main()
