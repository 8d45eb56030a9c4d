"""A byte-level transformer and the text it learns: Python's own standard-library sources.

Small enough to train on a laptop's CPU in a minute or two, real enough that a bad quantizer shows.
Nothing in this file knows about 1-bit weights.
"""

import math
import sysconfig
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

VOCABULARY = 256  # bytes
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
VALIDATION_SHARE = 20  # one file in 20


@dataclass(frozen=True)
class Config:
    """Shape of the transformer; every linear layer has `width` or `4 * width` inputs."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 128


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cache: Tensor | None = None, position: Tensor | None = None):
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, width / heads]
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            cache[0].index_copy_(2, position, k)
            cache[1].index_copy_(2, position, v)
            seen = torch.arange(cache.shape[3], device=x.device) <= position
            y = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=seen[None])
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor, cache: Tensor | None = None, position: Tensor | None = None):
        x = x + self.attention(self.attention_norm(x), cache, position)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class ByteLM(nn.Module):
    """Decoder-only transformer over bytes, learned positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.positions = nn.Parameter(torch.zeros(config.context, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY)
        # 0.1, not the 1.0 of nn.Embedding: 0.13 nats better after 300 steps.
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens ``[batch, time]`` int64, time <= context -> logits ``[batch, time, 256]``."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def new_cache(self, batch: int = 1) -> Tensor:
        """Keys and values of every layer, ``[layers, 2, batch, heads, context, width / heads]``."""
        c = self.config
        shape = (c.layers, 2, batch, c.heads, c.context, c.width // c.heads)
        return torch.zeros(shape, device=self.positions.device, dtype=self.positions.dtype)

    def decode(self, token: Tensor, position: Tensor, cache: Tensor) -> Tensor:
        """One step: token ``[batch, 1]`` at position ``[1]`` -> logits ``[batch, 256]``.

        Writes the step's keys and values into cache. Every shape is static and the position is a
        tensor, so a compiled decode is compiled once.
        """
        x = self.embedding(token) + self.positions[position]
        for layer, block in enumerate(self.blocks):
            x = block(x, cache[layer], position)
        return self.head(self.norm(x))[:, -1]


def load_text() -> tuple[Tensor, Tensor]:
    """(training, validation) text as uint8 tensors; a file's path decides where it goes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(relative.parts):
            held_out = zlib.crc32(relative.as_posix().encode()) % VALIDATION_SHARE == 0
            parts[held_out].append(path.read_bytes())
    training, validation = (bytearray(b"\n".join(parts[held_out])) for held_out in (False, True))
    return tuple(torch.frombuffer(text, dtype=torch.uint8) for text in (training, validation))


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets), each ``[len(starts), context]`` int64, targets one byte ahead."""
    rows = text[starts[:, None] + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def random_batches(text: Tensor, context: int, *, batch: int, count: int, seed: int):
    """Yield `count` batches (tokens, targets) drawn from text."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(text) - context - 1, (batch,), generator=generator)
        yield windows(text, starts, context)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats per byte."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, context: int, count: int = 512) -> float:
    """Validation loss in nats per byte over `count` windows spread evenly over text."""
    training = model.training
    model.eval()
    starts = torch.linspace(0, len(text) - context - 1, count).long()
    losses = []
    for part in starts.split(32):
        tokens, targets = windows(text, part, context)
        losses.append(cross_entropy(model(tokens), targets) * len(part))
    model.train(training)
    return float(sum(losses)) / count


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate at `step` of `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    model: nn.Module,
    text: Tensor,
    *,
    context: int,
    steps: int,
    learning_rate: float,
    batch: int = 32,
    warmup: int | None = None,
    weight_decay: float = 0.1,
    seed: int = 0,
    loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    title: str = "train",
) -> list[float]:
    """Train every parameter that requires grad; AdamW, warm-up, cosine. Returns the loss per step.

    loss_fn takes (logits, targets, tokens); the default is the cross entropy of the targets.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)
    warmup = max(1, steps // 20) if warmup is None else warmup
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, steps, warmup)
    )
    model.train()
    history = []
    batches = random_batches(text, context, batch=batch, count=steps, seed=seed)
    bar = tqdm(batches, total=steps, desc=title, mininterval=0.5)
    for tokens, targets in bar:
        logits = model(tokens)
        loss = loss_fn(logits, targets, tokens) if loss_fn else cross_entropy(logits, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        history.append(loss.item())
        if len(history) % 20 == 0:
            bar.set_postfix(loss=f"{sum(history[-20:]) / 20:.3f}", refresh=False)
    return history


@torch.no_grad()
def generate(
    model: ByteLM,
    prompt: bytes,
    length: int,
    *,
    decode: Callable[..., Tensor] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[bytes, Tensor]:
    """Continue prompt one token at a time to `length` bytes in all (<= context).

    decode is `model.decode` or its compiled form; temperature 0 takes the likeliest byte. Returns
    (prompt and continuation, logits of every position ``[length, 256]``).
    """
    model.eval()
    decode = decode or model.decode
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    cache = model.new_cache()
    logits = []
    for position in range(length):
        token = torch.tensor([[text[position]]])
        logits.append(decode(token, torch.tensor([position]), cache)[0])
        if position + 1 == len(text):
            text.append(pick(logits[-1], temperature, generator))
    return bytes(text[:length]), torch.stack(logits)


def pick(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
