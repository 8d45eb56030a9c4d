"""Activations and weights with structure, where rounding errors do not average out, and the
accuracy rule for a product of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import reference
import torch
from helpers import relative_error, to_numpy, torch_qmm
from torch import Tensor, nn

GROUPS = (32, 64, 128)


@cache
def trained_activations() -> Tensor:
    """Hidden activations ``[64, 512]`` of a small network trained to tell parities apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hidden = nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 512), nn.GELU())
        head = nn.Linear(512, 1)
        optimizer = torch.optim.Adam([*hidden.parameters(), *head.parameters()], lr=3e-3)
        for _ in range(60):
            bits = torch.randint(0, 2, (64, 16)).float()
            loss = nn.functional.mse_loss(head(hidden(bits)), bits[:, :3].sum(1, True) % 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return hidden(torch.randint(0, 2, (64, 16)).float()).detach()


def outliers(x: Tensor, size: float, group: int, position: int) -> Tensor:
    """x with a value of about ``size`` at one position of every group."""
    x = x.clone()
    x[:, position::group] = size * (1 + 0.1 * torch.randn_like(x[:, position::group]))
    return x


def trained(m: int, k: int) -> Tensor:
    return trained_activations().repeat(1 + m // 64, 1 + k // 512)[:m, :k].contiguous()


# name: activations [m, k] in groups, with outliers, if any, at one position of each group.
X: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "random": lambda m, k, g, p: torch.randn(m, k),
    "ones": lambda m, k, g, p: torch.ones(m, k),
    "a constant": lambda m, k, g, p: torch.full((m, k), float(torch.rand(()) + 0.1)),
    "0.3": lambda m, k, g, p: torch.full((m, k), 0.3),
    "0 or 1": lambda m, k, g, p: torch.randint(0, 2, (m, k)).float(),
    "a float16 number with all bits": lambda m, k, g, p: torch.full((m, k), 1 + 2.0**-10),
    "near 1": lambda m, k, g, p: 1 + 0.1 * torch.randn(m, k),
    "positive": lambda m, k, g, p: torch.randn(m, k).abs(),
    "uniform": lambda m, k, g, p: torch.rand(m, k),
    "relu": lambda m, k, g, p: torch.randn(m, k).relu(),
    "gelu": lambda m, k, g, p: nn.functional.gelu(torch.randn(m, k)),
    "silu times linear": lambda m, k, g, p: (
        nn.functional.silu(torch.randn(m, k)) * torch.randn(m, k)
    ),
    "softmax": lambda m, k, g, p: torch.softmax(3 * torch.randn(m, k), -1),
    "sharp softmax": lambda m, k, g, p: torch.softmax(12 * torch.randn(m, k), -1),
    "alternating": lambda m, k, g, p: 0.7 * (1 - 2 * (torch.arange(k) % 2)).expand(m, k).float(),
    "sorted": lambda m, k, g, p: torch.randn(m, k).sort(-1).values,
    "three values": lambda m, k, g, p: torch.tensor([0.1, 0.7, -1.3])[torch.randint(3, (m, k))],
    "sparse": lambda m, k, g, p: torch.randn(m, k) * (torch.rand(m, k) < 0.05),
    "over many magnitudes": lambda m, k, g, p: (
        torch.randn(m, k) * 2.0 ** torch.randint(-12, 5, (m, k))
    ),
    "tiny": lambda m, k, g, p: 1e-6 * torch.randn(m, k),
    "trained": lambda m, k, g, p: trained(m, k),
    **{
        f"outliers of {size}": lambda m, k, g, p, size=size: outliers(torch.randn(m, k), size, g, p)
        for size in (2.0, 16.0, 64.0, 128.0, 256.0, 1024.0, 1e4, 65000.0)
    },
    "outliers among ones": lambda m, k, g, p: outliers(torch.ones(m, k), 300.0, g, p),
    "outliers among positives": lambda m, k, g, p: outliers(torch.rand(m, k), 3e3, g, p),
}

# name: (scale, bias) of a group from a positive size d
LEVELS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor | None]]] = {
    "symmetric": lambda d: (d, None),
    "s = 2d, b = -d": lambda d: (2 * d, -d),
    "low is 0": lambda d: (d, torch.zeros_like(d)),
    "high is 0": lambda d: (d, -d),
    "high is near 0": lambda d: (d, -d * (1 - 2.0**-6)),
    "low is near 0": lambda d: (d, d * 2.0**-6),
    "negative scale": lambda d: (-d, d * 0.75),
    "one sign": lambda d: (d, 2 * d),
    "lopsided": lambda d: (d, -d * 0.25),
    "any": lambda d: (d, -d * torch.rand_like(d)),
}


def random_bits(n: int, k: int, g: int, p: int) -> Tensor:
    return torch.rand(n, k) < 0.5


def one_bit(n: int, k: int, g: int, p: int) -> Tensor:
    return (torch.arange(k) % g == p).expand(n, k)


def random_but(value: bool) -> Callable[[int, int, int, int], Tensor]:
    def bits(n: int, k: int, g: int, p: int) -> Tensor:
        b = random_bits(n, k, g, p)
        b[:, p::g] = value
        return b

    return bits


# name: bits [n, k] from the position where x has outliers
BITS: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "random": random_bits,
    "rare": lambda n, k, g, p: torch.rand(n, k) < 0.1,
    "common": lambda n, k, g, p: torch.rand(n, k) < 0.9,
    "all set": lambda n, k, g, p: torch.ones(n, k, dtype=torch.bool),
    "all clear": lambda n, k, g, p: torch.zeros(n, k, dtype=torch.bool),
    "one set": one_bit,
    "one clear": lambda n, k, g, p: ~one_bit(n, k, g, p),
    "one set elsewhere": lambda n, k, g, p: one_bit(n, k, g, (p + 1) % g),
    "one clear elsewhere": lambda n, k, g, p: ~one_bit(n, k, g, (p + 1) % g),
    "random, set at outliers": random_but(True),
    "random, clear at outliers": random_but(False),
}


@dataclass(frozen=True)
class Case:
    """Names from the tables above, and sizes; outliers are at ``position`` of every group."""

    x: str
    levels: str
    bits: str
    dtype: torch.dtype = torch.float32
    level_dtype: torch.dtype = torch.float32
    group: int = 128
    m: int = 4
    n: int = 200
    groups: int = 8
    position: int = 5
    transpose: bool = True


def pack(bits: Tensor) -> Tensor:
    """Bits ``[n, k]`` to int32 words ``[n, k // 32]``."""
    words = bits.view(*bits.shape[:-1], -1, 32).long() << torch.arange(32)
    return words.sum(-1).to(torch.int32)


def arguments(case: Case) -> tuple:
    """What ``qmm`` takes. Uses torch's random numbers."""
    k, p = case.groups * case.group, case.position % case.group
    most = torch.finfo(case.dtype).max / 64  # of no product beyond
    x = X[case.x](case.m, k, case.group, p).clamp(-most, most).to(case.dtype)
    if case.transpose:
        bits = BITS[case.bits](case.n, k, case.group, p)
    else:  # groups run along n; a row of bits meets one value of x
        bits = BITS[case.bits](k, case.n // case.group * case.group, case.group, p)
    d = 0.01 + 0.02 * torch.rand(bits.shape[0], bits.shape[1] // case.group)
    scales, biases = LEVELS[case.levels](d.to(case.level_dtype))
    return x, pack(bits), scales, biases, case.group, case.transpose


def is_prepackable(case: Case) -> bool:
    return case.transpose and torch.ops.onebit.can_prepack()


def errors(
    case: Case, *, prepacked: bool = False, device: str = "cpu"
) -> tuple[float, float, float]:
    """Relative errors against float64: ours, plain torch's, and what the rule allows.

    At most twice torch's, or twice half a unit in the last place where torch was luckier: some of
    these products have one distinct result, or none that needs rounding.
    """
    args = arguments(case)
    expected = reference.qmm(*(to_numpy(t) if isinstance(t, Tensor) else t for t in args))
    plain = relative_error(torch_qmm(*args), expected)
    if prepacked:
        x, packed, scales, biases, group, _ = args
        form = (len(packed), x.shape[-1], group, scales.dtype, biases is None)
        y = torch.ops.onebit.qmm_prepacked(
            x, torch.ops.onebit.prepack(packed, scales, biases, group), *form
        )
    else:
        y = torch.ops.onebit.qmm(*(t.to(device) if isinstance(t, Tensor) else t for t in args))
    return relative_error(y, expected), plain, 2 * max(plain, torch.finfo(case.dtype).eps / 2)
