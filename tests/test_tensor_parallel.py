"""Tensor parallelism in two processes: sharded layers compute what whole ones do."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from two_processes import PROCESSES, outcomes

import torch_onebit
from torch_onebit import OneBitEmbedding, OneBitLinear, OneBitStack, ops, prepack_


class Net(nn.Module):
    def __init__(self, symmetric: bool = False, group_size: int = 32) -> None:
        super().__init__()
        form = {"symmetric": symmetric, "group_size": group_size}
        self.embedding = OneBitEmbedding(20, 128, **form)
        self.up = OneBitLinear(128, 192, **form)
        self.down = OneBitLinear(192, 128, **form)
        self.head = OneBitLinear(128, 20, bias=False, **form)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.down(F.gelu(self.up(x))))


def parallel(model: nn.Module) -> nn.Module:
    from torch_onebit.distributed import ColwiseParallel, RowwiseParallel

    plan = {
        "embedding": ColwiseParallel(output_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, dist.init_device_mesh("cpu", (PROCESSES,)), plan)


class Mixture(nn.Module):
    """Experts as OneBitExperts calls them: gate and up by rows of x, down one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (OneBitStack(3, 64, 128, group_size=32) for _ in range(2))
        self.down_proj = OneBitStack(3, 128, 64, group_size=32)

    def forward(self, x, chosen, rows):
        inner = F.silu(self.gate_proj(x, chosen, rows)) * self.up_proj(x, chosen, rows)
        return self.down_proj(inner, chosen)


def experts() -> None:
    from torch_onebit.distributed import ColwiseParallel, RowwiseParallel

    plain = Mixture().requires_grad_(True)
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
    plan["down_proj"] = RowwiseParallel()
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    sharded = parallelize_module(copy.deepcopy(plain), mesh, plan)
    x, rows = torch.randn(4, 64), torch.tensor([0, 0, 1, 2, 2, 3])
    chosen = torch.tensor([0, 1, 1, 0, 2, 2])
    xs = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = (m(t, chosen, rows) for m, t in zip((sharded, plain), xs, strict=True))
    torch.testing.assert_close(y, expected)
    for result in (y, expected):
        result.square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    gradients = {name: p.grad for name, p in sharded.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].full_tensor(), parameter.grad, msg=name)
    held = sum(b.to_local().numel() for b in sharded.buffers())
    assert held * PROCESSES == sum(b.numel() for b in plain.buffers())


def prepacked() -> None:
    """Sharding takes prepacked layers apart; sharded ones are not prepacked, and say why."""
    plain = Net()
    sharded = parallel(prepack_(copy.deepcopy(plain).eval()))
    with torch.no_grad():
        torch.testing.assert_close(sharded(tokens()), plain(tokens()))
    with pytest.warns(UserWarning, match="prepack_ swapped nothing: weight must be of one device"):
        prepack_(sharded)
    with pytest.raises(ValueError, match=r"weight must be of one device .* got a DTensor"):
        sharded.up.prepack()


def tokens() -> torch.Tensor:
    return torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(1))


def same_outputs(**options) -> None:
    plain = Net(**options)
    sharded = parallel(copy.deepcopy(plain))
    with torch.no_grad():
        torch.testing.assert_close(sharded(tokens()), plain(tokens()))
    held = sum(b.to_local().numel() for b in sharded.buffers())
    assert held * PROCESSES == sum(b.numel() for b in plain.buffers())


def levels_train() -> None:
    plain = Net().requires_grad_(False)
    for layer in (plain.up, plain.down, plain.head):
        layer.requires_grad_(True)
    sharded = parallel(copy.deepcopy(plain))
    for model in (plain, sharded):
        F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten()).backward()
    gradients = {name: p.grad for name, p in sharded.named_parameters() if p.requires_grad}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name].full_tensor(), parameter.grad)


def compiled() -> None:
    plain = Net()
    sharded = torch.compile(parallel(copy.deepcopy(plain)), backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(sharded(tokens()), plain(tokens()))


def saved_by_two_loaded_by_one(folder: str) -> None:
    plain = Net()
    dcp.save(get_model_state_dict(parallel(copy.deepcopy(plain))), checkpoint_id=folder)
    dist.barrier()
    loaded = Net()
    state = get_model_state_dict(loaded)
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(loaded, state)
    for name, expected in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], expected), name


def rules() -> None:
    """Operators on DTensors placed otherwise than the layers place them."""
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    put = lambda t, placement: distribute_tensor(t, mesh, [placement])
    packed, scales, biases = ops.quantize(torch.randn(64, 128), 32)
    x, back, ids = torch.randn(4, 128), torch.randn(4, 64), torch.randint(64, (6,))
    stack = ops.quantize(torch.randn(3, 32, 128), 32)
    chosen = torch.tensor([0, 2, 1, 2])
    cases = {
        "rows of x": (ops.qmm, (x, packed, scales, biases, 32), (Shard(0), *[Replicate()] * 3)),
        "x W, outputs": (
            lambda *a: ops.qmm(*a, transpose=False),
            (back, packed, scales, biases, 32),
            (Replicate(), *[Shard(1)] * 3),
        ),
        "x W, inputs": (
            lambda *a: ops.qmm(*a, transpose=False),
            (back, packed, scales, biases, 32),
            (Shard(1), *[Shard(0)] * 3),
        ),
        "groups that the devices do not divide": (
            ops.qmm,
            (x[:, :96], packed[:, :3].contiguous(), scales[:, :3], biases[:, :3], 32),
            (Replicate(), *[Shard(1)] * 3),
        ),
        "indices": (
            ops.embedding,
            (ids, packed, scales, biases, 32),
            (Shard(0), *[Replicate()] * 3),
        ),
        "matrices chosen, outputs": (
            ops.gather_qmm,
            (x.view(4, 1, 128), *stack, None, chosen, 32),
            (Replicate(), *[Shard(1)] * 3, None, Replicate()),
        ),
        "matrices chosen, inputs": (
            ops.gather_qmm,
            (x.view(4, 1, 128), *stack, None, chosen, 32),
            (Shard(2), *[Shard(2)] * 3, None, Replicate()),
        ),
        "matrices chosen, choices": (
            ops.gather_qmm,
            (x.view(4, 1, 128), *stack, chosen, chosen, 32),
            (Replicate(), *[Replicate()] * 3, Shard(0), Shard(0)),
        ),
        "matrices chosen, transposed": (
            lambda *a: ops.gather_qmm(*a, transpose=False),
            (back.view(4, 2, 32), *stack, None, chosen, 32),
            (Shard(2), *[Shard(1)] * 3, None, Replicate()),
        ),
        "decoded": (ops.dequantize, (packed, scales, biases, 32), [Shard(1)] * 3),
    }
    for name, (op, args, placements) in cases.items():
        spread = [p and put(a, p) for a, p in zip(args, placements, strict=False)]
        y = op(*spread, *args[len(placements) :])
        assert isinstance(y, DTensor)
        torch.testing.assert_close(y.full_tensor(), op(*args), msg=name)


def errors() -> None:
    from torch_onebit.distributed import ColwiseParallel, RowwiseParallel

    tied = torch_onebit.quantize_(Tied(), group_size=32, progress=False)
    cases = [
        (OneBitLinear(96, 64, group_size=32), RowwiseParallel(), ValueError,
         r"in_features must be a multiple of 64 .* got 96"),
        (OneBitEmbedding(9, 128, group_size=128), ColwiseParallel(), ValueError,
         r"embedding_dim must be a multiple of 256 .* got 128"),
        (OneBitEmbedding(9, 128, group_size=32), RowwiseParallel(), TypeError,
         "module must be a OneBitLinear"),
        (nn.Linear(64, 64), ColwiseParallel(), TypeError, "module must be a OneB"),
        (tied.head, ColwiseParallel(), ValueError, "module must not share its weights"),
    ]  # fmt: skip
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    for module, style, kind, words in cases:
        with pytest.raises(kind, match=words):
            parallelize_module(module, mesh, style)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 64), nn.Linear(64, 20, bias=False)
        self.head.weight = self.embedding.weight


CASES = {
    "outputs": same_outputs,
    "outputs, symmetric": lambda: same_outputs(symmetric=True),
    "levels train": levels_train,
    "compiled": compiled,
    "placed otherwise": rules,
    "errors": errors,
    "experts": experts,
}
if torch.ops.onebit.can_prepack():
    CASES["prepacked"] = prepacked


def cases(folder):
    return {**CASES, "checkpoint": lambda: saved_by_two_loaded_by_one(f"{folder}/saved")}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return outcomes(cases, tmp_path_factory.mktemp("parallel"))


@pytest.mark.parametrize("name", [*CASES, "checkpoint"])
def test_sharded_layers(name, results):
    assert [of_rank[name] for of_rank in results] == [""] * PROCESSES
