"""What calibrate_ makes of batches of all kinds."""

import re
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from torch_onebit.calibration.batches import as_calls


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x, mask=None, *, scale=1.0):
        return self.layer(x if mask is None else x * mask) * scale


class Batch(UserDict):
    """As BatchEncoding: a mapping that is no dict."""


class TakesAll(nn.Module):
    def forward(self, *args, **kwargs):
        return args, kwargs


class Optional(nn.Module):
    def forward(self, x=None, mask=None):
        return x


class WholeBatch(nn.Module):
    def forward(self, batch):
        return batch["x"]


X, Y = torch.randn(4, 32), torch.randint(3, (4,))
PAIRS = DataLoader(list(zip(X, Y, strict=True)), batch_size=2)
DICTS = DataLoader([{"x": x, "y": y} for x, y in zip(X, Y, strict=True)], batch_size=2)
READINGS = [
    ("tensors", Masked, [X, X], 1, [], "2 batches: Tensor as x"),
    ("tuples of all arguments", Masked, [(X, X)], 2, [], "1 batches: tuple of 2 as x, mask"),
    ("inputs and labels", nn.Identity, [(X, Y)], 1, [], "tuple of 2 as input, 1 more left out"),
    ("a loader of inputs and labels", Masked, PAIRS, 1, [], "2 batches: .* as x, 1 more left out"),
    ("a loader of dicts", Masked, DICTS, 0, ["x"], "2 batches: dict as x, y left out"),
    ("a mapping", Masked, [Batch(x=X, scale=2.0)], 0, ["x", "scale"], "Batch as x, scale"),
    ("a dict that is the argument", WholeBatch, [{"x": X}], 1, [], "dict as batch"),
    ("anything goes", TakesAll, [(X, Y), {"a": X}], 2, [], "as .*args, .*args; dict as a"),
]


@pytest.mark.parametrize(
    "why, model, batches, positional, keywords, text", READINGS, ids=[row[0] for row in READINGS]
)
def test_batches_are_read_as_people_have_them(why, model, batches, positional, keywords, text):
    calls, words = as_calls(model(), batches)
    args, kwargs = calls[0]
    assert len(args) == positional and list(kwargs) == keywords
    assert re.search(text, words), words


UNCLEAR = [
    ("labels or a mask", Optional, PAIRS, r"which arguments of forward\(x=, mask=\) .* tuple of 2"),
    ("anything, from a loader", TakesAll, PAIRS, r"which arguments of forward\(\*args\)"),
    (
        "many",
        lambda: nn.Transformer(32, 2, 1, 1, 32),
        [(X,)],
        r"forward\(src, tgt, src_mask=, tgt_mask=, \.\.\.\) they are",
    ),
    ("three for one or two", Masked, [(X, X, X)], r"which arguments of forward\(x, mask=\) "),
    ("too few", Masked, [()], r"which arguments of forward\(x, mask=\) .* tuple of 0"),
    ("other names", Optional, [{"y": X}], r"hold the arguments of forward\(x=, mask=\), .* of y"),
    ("none", Masked, [], "hold at least one batch, got none"),
]


@pytest.mark.parametrize("why, model, batches, text", UNCLEAR, ids=[row[0] for row in UNCLEAR])
def test_batches_that_could_mean_two_things_are_refused(why, model, batches, text):
    with pytest.raises(ValueError, match=f"batches must .*{text}"):
        as_calls(model(), batches)
