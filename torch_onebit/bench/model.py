"""Tokens per second of a decoder of Qwen3-1.7B's shape, in 1 bit and bfloat16, random weights."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_onebit.bench.measure import time_once
from torch_onebit.nn import OneBitLinear
from torch_onebit.prepacking import prepack_


@dataclass
class Shape:
    layers: int = 28
    hidden: int = 2048
    intermediate: int = 6144
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 151936
    context: int = 1024


class Block(nn.Module):
    """Attention with grouped keys and a cache, then a gated MLP. (No rotary embedding: no cost.)"""

    def __init__(self, s: Shape, linear: type[nn.Module]) -> None:
        super().__init__()
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.shape = s
        self.norm1 = nn.RMSNorm(s.hidden, dtype=torch.bfloat16)
        self.norm2 = nn.RMSNorm(s.hidden, dtype=torch.bfloat16)
        options = {"bias": False, "dtype": torch.bfloat16}
        self.q, self.k, self.v = (linear(s.hidden, d, **options) for d in (q, kv, kv))
        self.o = linear(q, s.hidden, **options)
        self.gate = linear(s.hidden, s.intermediate, **options)
        self.up = linear(s.hidden, s.intermediate, **options)
        self.down = linear(s.intermediate, s.hidden, **options)
        cache = torch.zeros(2, s.kv_heads, s.context, s.head_dim, dtype=torch.bfloat16)
        self.register_buffer("cache", cache, persistent=False)

    def forward(self, x: Tensor, position: int) -> Tensor:
        s, tokens = self.shape, x.shape[0]
        h = self.norm1(x)
        q, k, v = (
            p(h).unflatten(-1, (-1, s.head_dim)).transpose(-2, -3) for p in (self.q, self.k, self.v)
        )
        end = position + tokens
        self.cache[0, :, position:end], self.cache[1, :, position:end] = k, v
        # Of the stock forms the fastest for one token: docs/speed.md.
        h = F.scaled_dot_product_attention(
            q[None], *self.cache[:, None, :, :end], is_causal=position == 0, enable_gqa=True
        )
        h = h.reshape(-1, tokens, s.head_dim)
        x = x + self.o(h.transpose(-2, -3).flatten(-2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    def __init__(self, shape: Shape, linear: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(shape, linear) for _ in range(shape.layers))
        self.head = linear(shape.hidden, shape.vocabulary, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor, position: int) -> Tensor:
        """Hidden states ``[tokens, hidden]`` to the logits of the last one.

        Either all of a prompt, position 0, or one token after it.
        """
        for block in self.blocks:
            x = block(x, position)
        return self.head(x[-1:])


class _EmptyLinear(nn.Linear):
    """All weights alike: filling 1.7 G of them at random would take longer than the rest."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.001)


def measure_model(prompt: int = 512, tokens: int = 16) -> list[dict[str, object]]:
    """Prefill and decode, tokens per second; one model at a time is in memory."""
    rows = []
    kinds = [("1 bit", OneBitLinear), ("bfloat16", _EmptyLinear)]
    if torch.ops.onebit.can_prepack():
        kinds.insert(1, ("1 bit, prepacked", OneBitLinear))
    for name, linear in kinds:
        with torch.inference_mode():
            model = Decoder(Shape(), linear)
            if "prepacked" in name:
                prepack_(model)
            x = torch.randn(prompt, Shape.hidden).bfloat16()
            model(x[:8], 0)
            prefill = time_once(lambda model=model, x=x: model(x, 0))
            model(x[:1], prompt)
            steps = [
                time_once(lambda model=model, x=x, i=i: model(x[:1], prompt + i))
                for i in range(tokens)
            ]
        decode = sorted(steps)[tokens // 2]
        nbytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        rows.append(
            {
                "name": name,
                "prefill_tokens_per_second": prompt / prefill,
                "decode_tokens_per_second": 1 / decode,
                "bytes": nbytes,
            }
        )
        del model
    return rows
