"""A decoder in plain PyTorch, in the shapes of models that people run: what benchmarks decode with.

Weights are random. Layers are what a factory makes, so that one class is the float model and the
packed one; projections that read the same x are one layer, on both sides.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import parallelize_module

from torch_onebit import OneBitEmbedding, OneBitLinear


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_size


QWEN3_8B = Shape(4096, 36, 32, 8, 128, 12288, 151936)
LLAMA3_70B = Shape(8192, 80, 64, 8, 128, 28672, 128256)
SMOLLM2_135M = Shape(576, 30, 9, 3, 64, 1536, 49152)

# (columns, rows) to a layer without a bias.
Linear = Callable[[int, int], nn.Module]


def float_layers(dtype: torch.dtype = torch.bfloat16, device="cuda") -> tuple[Linear, Linear]:
    """Factories of linear and embedding layers."""
    options = {"device": device, "dtype": dtype}
    return (
        lambda k, n: nn.Linear(k, n, bias=False, **options),
        lambda rows, k: nn.Embedding(rows, k, **options),
    )


def packed_layers(
    dtype: torch.dtype = torch.bfloat16, device="cuda", **form: object
) -> tuple[Linear, Linear]:
    """The same, packed; form: group_size, symmetric."""
    options = {"device": device, "dtype": dtype, **form}
    return (
        lambda k, n: OneBitLinear(k, n, bias=False, **options),
        lambda rows, k: OneBitEmbedding(rows, k, **options),
    )


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Grouped-query attention; with a cache, of one new position per sequence.

    parts: outputs of qkv lie in so many parts of whole heads, so that their shards are parts. A
    shard alone is an attention of one part with fewer heads.
    """

    def __init__(self, shape: Shape, linear: Linear, parts: int = 1) -> None:
        super().__init__()
        self.parts, self.size = parts, shape.head_size
        self.queries = shape.heads // shape.kv_heads  # of a key head
        self.qkv = linear(shape.hidden, shape.qkv)
        self.out = linear(shape.heads * shape.head_size, shape.hidden)

    def forward(self, x, rope, cache, position):
        batch, length, _ = x.shape
        qkv = self.qkv(x).unflatten(-1, (self.parts, -1))
        kv = qkv.shape[-1] // (self.queries + 2)
        q, k, v = (
            t.reshape(batch, length, -1, self.size).transpose(1, 2)
            for t in qkv.split([self.queries * kv, kv, kv], -1)
        )
        q, k = (rotate(F.rms_norm(t, (self.size,)), rope).to(v.dtype) for t in (q, k))
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.out(y.transpose(1, 2).reshape(batch, length, -1))
        from decode_attention import attend  # in Triton, which not every torch brings

        keys, values = cache
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        return self.out(attend(q, keys, values, position).reshape(batch, 1, -1))


class MLP(nn.Module):
    def __init__(self, shape: Shape, linear: Linear, parts: int = 1) -> None:
        super().__init__()
        self.parts = parts
        self.gate_up = linear(shape.hidden, 2 * shape.inner)
        self.down = linear(shape.inner, shape.hidden)

    def forward(self, x):
        gate, up = self.gate_up(x).unflatten(-1, (self.parts, -1)).chunk(2, -1)
        return self.down((F.silu(gate) * up).flatten(-2))


class Layer(nn.Module):
    def __init__(self, shape: Shape, linear: Linear, parts: int = 1) -> None:
        super().__init__()
        self.attention = Attention(shape, linear, parts)
        self.mlp = MLP(shape, linear, parts)

    def forward(self, x, change, rope, cache, position):
        """What the layer before adds is added here: one kernel with the norm."""
        size = (x.shape[-1],)
        x = x + change
        x = x + self.attention(F.rms_norm(x, size), rope, cache, position)
        return x, self.mlp(F.rms_norm(x, size))


class Decoder(nn.Module):
    def __init__(self, shape: Shape, layers: tuple[Linear, Linear], parts: int = 1) -> None:
        super().__init__()
        linear, embedding = layers
        self.shape = shape
        self.embedding = embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, linear, parts) for _ in range(shape.layers))
        self.head = linear(shape.hidden, shape.vocabulary)

    def compile_layers(self) -> "Decoder":
        """One compiled graph serves all layers: seconds instead of minutes."""
        for layer in self.layers:
            layer.compile(fullgraph=True)
        return self

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        size, device = self.shape.head_size, self.device
        steps = 10000.0 ** (-torch.arange(0, size, 2, device=device) / size)
        angle = torch.arange(length, device=device)[:, None] * steps
        return angle.cos(), angle.sin()

    def caches(self, batch: int, length: int, ranks: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, to be filled."""
        sizes = (batch, self.shape.kv_heads // ranks, length, self.shape.head_size)
        options = {"device": self.device, "dtype": torch.bfloat16}
        return [(torch.randn(sizes, **options), torch.randn(sizes, **options)) for _ in self.layers]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, ids, rope, caches=None, position=None):
        """Logits ``[batch, length, vocabulary]``."""
        length = ids.shape[1]
        rope = [t[:length] if position is None else t.index_select(0, position) for t in rope]
        x = self.embedding(ids)
        change = torch.zeros_like(x)
        for i, layer in enumerate(self.layers):
            x, change = layer(x, change, rope, caches[i] if caches else None, position)
        return self.head(F.rms_norm(x + change, (x.shape[-1],)))


def parallelize(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """Shard the layers and the head of a packed decoder of one part, in place."""
    from torch_onebit.distributed import ColwiseParallel, RowwiseParallel

    plan = {
        "layers.*.attention.qkv": ColwiseParallel(),
        "layers.*.attention.out": RowwiseParallel(),
        "layers.*.mlp.gate_up": ColwiseParallel(),
        "layers.*.mlp.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


class Decoding:
    """Tokens one after the other, each step the replay of one graph: no Python runs in between."""

    def __init__(self, model: Decoder, batch: int, context: int, ranks: int = 1) -> None:
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
        self.position = torch.zeros(1, dtype=torch.long, device="cuda")
        self.model, self.context = model, context
        self.rope, self.caches = model.rope(context), model.caches(batch, context, ranks)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels are compiled, libraries made
                self.step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.step()

    @torch.no_grad()
    def step(self) -> None:
        logits = self.model(self.ids, self.rope, self.caches, self.position)
        self.ids.copy_(logits.argmax(-1))
        self.position.add_(1).remainder_(self.context)

    def seconds(self, tokens: int, position: int) -> float:
        """Of one step, from this position on."""
        self.position.fill_(position)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()
        start.record()
        for _ in range(tokens):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / tokens
