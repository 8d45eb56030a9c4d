"""A small model to save and load."""

import torch
from torch import nn

from torch_onebit import (
    quantize_,
)


class Net(nn.Module):
    """An embedding, a layer with a bias, one without, a norm and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64, padding_idx=3)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.register_buffer("steps", torch.tensor(7))
        self.head = nn.Linear(64, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids)
        return self.head(self.norm(h + self.down(torch.relu(self.up(h)))))


IDS = torch.arange(12).view(2, 6)


def make(tied: bool = False, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    return quantize_(Net(tied).to(dtype), **{"group_size": 32, **options})


def assert_same_state(one: nn.Module, two: nn.Module) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
