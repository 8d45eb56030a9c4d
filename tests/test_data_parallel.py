"""FSDP2 and DDP in two processes: halves of a batch take the steps of plain training."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from two_processes import PROCESSES, outcomes

import torch_onebit


class Net(nn.Module):
    def __init__(self, tied: bool = False, parametrized: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 20, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        if parametrized:
            parametrizations.weight_norm(self.body)

    def forward(self, tokens):
        return self.head(F.gelu(self.body(self.embedding(tokens))))


def qat(rule: str = "mean", **options: bool) -> nn.Module:
    return torch_onebit.prepare_qat_(Net(**options), method=rule, group_size=32)


def packed(**options: bool) -> nn.Module:
    return torch_onebit.quantize_(Net(**options), group_size=32)


MODELS = {
    "QAT": qat,
    "QAT learnable": lambda: qat("learnable"),
    "QAT, shared weights": lambda: qat(tied=True),
    "QAT, parametrized weights": lambda: qat(parametrized=True),
    "packed, levels train": lambda: torch_onebit.thaw_levels_(packed()),
    "packed, shared weights": lambda: torch_onebit.thaw_levels_(packed(tied=True)),
    "packed, LoRA": lambda: torch_onebit.add_lora_(packed()),
}


def train(model: nn.Module, tokens: torch.Tensor) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(3):
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shard(model: nn.Module) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    fully_shard(model.body, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compare(make, wrap) -> str:
    """What differs between training on halves of a batch and plain training; or ""."""
    plain = make()
    tokens = torch.randint(20, (4, 9))
    model = copy.deepcopy(plain)
    losses = train(plain, tokens)
    own = train(wrap(model), tokens.chunk(PROCESSES)[dist.get_rank()])
    if not losses[-1] < losses[0]:
        return f"losses {losses} do not fall"
    mean = torch.tensor(own)
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / PROCESSES, torch.tensor(losses))
    words = {name: b for name, b in model.named_buffers()}
    for name, expected in plain.named_buffers():
        if not torch.equal(words[name], expected):
            return f"{name} changed"
    trained = dict(model.named_parameters())
    for name, expected in plain.named_parameters():
        got = trained[name]
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        torch.testing.assert_close(got, expected, msg=name)
    return ""


ENGINES = {"FSDP2": shard, "DDP": DistributedDataParallel}
CASES = [f"{engine}: {model}" for engine in ENGINES for model in MODELS]


def cases(folder):
    found = {}
    for case in CASES:
        engine, model = case.split(": ")
        found[case] = functools.partial(compare, MODELS[model], ENGINES[engine])
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return outcomes(cases, tmp_path_factory.mktemp("data_parallel"))


@pytest.mark.parametrize("name", CASES)
def test_training_matches(name, results):
    assert [of_rank[name] for of_rank in results] == [""] * PROCESSES
