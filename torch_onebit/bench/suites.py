"""The comparisons: one shape at many batch sizes, real models' shapes, memory-bound passes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from torch_onebit import ops
from torch_onebit.bench.limits import FMA_STEPS
from torch_onebit.bench.measure import Timing, interleave
from torch_onebit.bench.peers import Weights, error, ours, peers, prepacked

BATCHES = (1, 2, 4, 8, 32, 128, 512)

# n x k of the projections of one layer.
MODEL_SHAPES = {
    "Qwen3-1.7B q, o": (2048, 2048),
    "Qwen3-1.7B k, v": (1024, 2048),
    "Qwen3-1.7B gate, up": (6144, 2048),
    "Qwen3-1.7B down": (2048, 6144),
    "Qwen3-4B q": (4096, 2560),
    "Qwen3-4B gate, up": (9728, 2560),
    "Qwen3-4B down": (2560, 9728),
    "Qwen3-8B q, o": (4096, 4096),
    "Qwen3-8B gate, up": (12288, 4096),
    "Qwen3-8B down": (4096, 12288),
}

# Shapes that share no factor with the tiles, beside the regular shape they should keep up with.
ODD_SHAPES = {
    "m=3 (beside m=4)": (3, 4096, 4096),
    "m=4": (4, 4096, 4096),
    "m=7 (beside m=8)": (7, 4096, 4096),
    "m=8": (8, 4096, 4096),
    "m=33 (beside m=32)": (33, 4096, 4096),
    "m=32": (32, 4096, 4096),
    "m=200 (beside m=128)": (200, 4096, 4096),
    "m=128": (128, 4096, 4096),
    "n=4097, m=128": (128, 4097, 4096),
    "k=2560, m=128": (128, 4096, 2560),
    "k=9728, m=128": (128, 4096, 9728),
    "k=17408, m=128": (128, 4096, 17408),
    "m=1": (1, 4096, 4096),
    "14336x4096, m=1": (1, 14336, 4096),
    "4096x14336, m=1": (1, 4096, 14336),
    "14336x4096, m=128": (128, 14336, 4096),
    "4096x14336, m=128": (128, 4096, 14336),
}

# More than any cache holds.
COLD_BYTES = 240 << 20

Row = dict[str, object]


def _row(case: str, name: str, work: float, unit: str, timing: Timing, **more: object) -> Row:
    rate = {f"G{unit}/s": work / timing.median / 1e9}
    return {"case": case, "name": name, **rate, **timing.as_dict(), **more}


def batches(n: int, k: int, group_size: int, rounds: int, sizes: tuple[int, ...]) -> list[Row]:
    """Everything against everything at n x k, for each number of rows."""
    rows = []
    weights = Weights.random(n, k, group_size)
    dense = weights.dense()
    for m in sizes:
        x = torch.randn(m, k)
        calls = peers(x, weights)
        errors = {name: error(call(), x, dense) for name, call in calls.items()}
        for name, timing in interleave(calls, rounds).items():
            case = f"{n}x{k} m={m}"
            rows.append(_row(case, name, m * n * k, "MAC", timing, error=errors[name]))
    return rows


def cold(n: int, k: int, group_size: int, rounds: int) -> list[Row]:
    """One row of x, each call with other weights: all of them come from memory.

    The stream read is of as many bytes as the weights have.
    """
    nbytes = Weights.random(n, k, group_size).nbytes
    copies = [Weights.random(n, k, group_size) for _ in range(COLD_BYTES // nbytes + 1)]
    memory = torch.zeros(len(copies) * nbytes // 4)
    products = {}
    for name, x in (("f32", torch.randn(1, k)), ("bf16", torch.randn(1, k).bfloat16())):
        products[f"onebit {name}"] = [ours(x, w) for w in copies]
        if torch.ops.onebit.can_prepack():
            products[f"onebit {name} prepacked"] = [prepacked(x, w) for w in copies]
    calls = {name: lambda each=each: [call() for call in each] for name, each in products.items()}
    calls["stream read"] = lambda: torch.ops.onebit_bench.read_memory(memory)
    times = interleave(calls, rounds)
    work = len(copies) * n * k
    read = times["stream read"].median
    case = f"{n}x{k} m=1 out of cache"
    return [
        _row(case, name, work, "MAC", t, of_stream=read / t.median) for name, t in times.items()
    ]


def layouts(n: int, k: int, group_size: int, rounds: int) -> list[Row]:
    """Row-major weights against prepacked ones, from one row of x to many."""
    rows, w = [], Weights.random(n, k, group_size)
    for m in (1, 4, 8, 33, 128, 512):
        x = torch.randn(m, k)
        both = {"f32": x, "bf16": x.bfloat16()}
        calls = {f"onebit {name}": ours(x, w) for name, x in both.items()}
        if torch.ops.onebit.can_prepack():
            calls |= {f"onebit {name} prepacked": prepacked(x, w) for name, x in both.items()}
        times = interleave(calls, rounds)
        for name, timing in times.items():
            before = times[name.removesuffix(" prepacked")].median
            rate = before / timing.median
            rows.append(_row(f"{n}x{k} m={m}", name, m * n * k, "MAC", timing, of_row_major=rate))
    return rows


def model_shapes(group_size: int, rounds: int) -> list[Row]:
    """The projections of real models, one row and 128."""
    rows = []
    for name, (n, k) in MODEL_SHAPES.items():
        w = Weights.random(n, k, group_size)
        dense = w.dense().bfloat16()
        for m in (1, 128):
            x = torch.randn(m, k)
            bf16 = x.bfloat16()
            calls = {
                "onebit f32": ours(x, w),
                "onebit bf16": ours(bf16, w),
                "F.linear bf16": lambda x=bf16, dense=dense: F.linear(x, dense),
            }
            for peer, timing in interleave(calls, rounds).items():
                rows.append(_row(f"{name} {n}x{k} m={m}", peer, m * n * k, "MAC", timing))
    return rows


def variants(rounds: int) -> list[Row]:
    """Our kernel where it could be slower: odd sizes, small groups, transpose=False."""
    calls, macs = {}, {}
    for name, (m, n, k) in ODD_SHAPES.items():
        calls[name] = ours(torch.randn(m, k), Weights.random(n, k, 128))
        macs[name] = m * n * k
    x = torch.randn(128, 4096)
    for group_size in (64, 32):
        name = f"group {group_size}, m=128"
        calls[name] = ours(x, Weights.random(4096, 4096, group_size))
        macs[name] = 128 * 4096 * 4096
    w = Weights.random(4096, 4096, 128)
    calls["transpose=False, m=128"] = lambda: ops.qmm(x, *w.tensors(), transpose=False)
    macs["transpose=False, m=128"] = 128 * 4096 * 4096
    times = interleave(calls, rounds)
    return [_row(name, "onebit f32", macs[name], "MAC", t) for name, t in times.items()]


def threads(rounds: int) -> list[Row]:
    """One thread against all of them; the FMA peak says how much a second one gives at most."""
    count = torch.get_num_threads()

    def peak() -> int:
        return torch.ops.onebit_bench.multiply_adds(FMA_STEPS)

    macs = peak()
    work = {"float32 FMA peak": (peak, {1: macs // count, count: macs})}
    for m in (1, 8, 128):
        call = ours(torch.randn(m, 4096), Weights.random(4096, 4096, 128))
        work[f"4096x4096 m={m}"] = (call, dict.fromkeys((1, count), m * 4096 * 4096))

    def on(number: int, call: Callable[[], object]) -> object:
        torch.set_num_threads(number)
        return call()

    rows = []
    for case, (call, macs_of) in work.items():
        times = interleave({c: lambda c=c, call=call: on(c, call) for c in macs_of}, rounds)
        rows += [_row(case, f"{c} threads", macs_of[c], "MAC", t) for c, t in times.items()]
    torch.set_num_threads(count)
    return rows


def passes(rounds: int) -> list[Row]:
    """quantize and dequantize against a read of as many bytes."""
    w = torch.randn(4096, 4096)
    half = w.half()
    packed, scales, biases = ops.quantize(w, 128)
    times = interleave(
        {
            "stream read f32": lambda: torch.ops.onebit_bench.read_memory(w),
            "quantize f32": lambda: ops.quantize(w, 128),
            "quantize f16": lambda: ops.quantize(half, 128),
            "dequantize f32": lambda: ops.dequantize(packed, scales, biases, 128),
        },
        rounds,
    )
    size = {name: w.numel() * (2 if "f16" in name else 4) for name in times}
    return [_row("4096x4096", name, size[name], "B", t) for name, t in times.items()]


@torch.inference_mode(False)
def overhead(rounds: int) -> list[Row]:
    """A product so small that the call is what takes time, and nn.Linear's.

    Tensors of inference mode do not pass autograd: the difference is what it adds.
    """
    from torch_onebit.nn import OneBitLinear

    layer = OneBitLinear(128, 32).requires_grad_(False)
    linear = torch.nn.Linear(128, 32).requires_grad_(False)
    x = torch.randn(1, 128)
    qmm, arguments = torch.ops.onebit.qmm, (x, layer.weight, layer.scales, layer.biases)
    with torch.inference_mode():
        below = tuple(t.clone() for t in arguments)
    calls = {
        "torch.ops.onebit.qmm": lambda: qmm(*arguments, 128),
        "the same below autograd": lambda: qmm(*below, 128),
        "OneBitLinear": lambda: layer(x),
        "nn.Linear": lambda: linear(x),
    }
    times = interleave(calls, rounds)
    return [_row("call, 32x128 m=1", name, 32 * 128, "MAC", t) for name, t in times.items()]
