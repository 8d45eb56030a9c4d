"""Whole decoders on NVIDIA GPUs: tokens per second, memory and training steps, beside bfloat16.

``python benchmarks/bench_cuda_model.py`` prints the tables and writes
``benchmarks/results/cuda_model.json``. By ``torchrun --nproc-per-node 2`` it decodes the largest
model on one GPU and on all, into ``cuda_parallel.json``. ``--report`` renders both into ``docs/``.
"""

import argparse
import gc
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import torch_onebit

sys.path.insert(0, str(Path(__file__).parent))
import pages
from decoder import (
    LLAMA3_70B,
    QWEN3_8B,
    SMOLLM2_135M,
    Decoder,
    Decoding,
    float_layers,
    packed_layers,
    parallelize,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CONTEXT = 512
Row = dict


def free() -> None:
    torch._dynamo.reset()  # graphs of other models count against its limit
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def read_bytes_per_second() -> float:
    """What a reduction of 4 GB reads: nothing that streams weights is faster."""
    data = torch.ones(1 << 30, device="cuda")
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        data.sum()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return data.numel() * 4 / min(times)


def weight_bytes(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def decode(what: str, shape, layers, batch: int, read: float, tokens: int = 64) -> Row:
    """Median seconds of a step at half of the context."""
    free()
    with torch.no_grad():
        model = Decoder(shape, layers).requires_grad_(False).compile_layers()
        # All weights but the rows of the embedding that are not looked up are read per step.
        moved = weight_bytes(model) - weight_bytes(model.embedding)
        cache = 2 * 2 * batch * CONTEXT * shape.kv_heads * shape.head_size * shape.layers
        decoding = Decoding(model, batch, CONTEXT)
        seconds = statistics.median(decoding.seconds(tokens, CONTEXT // 2) for _ in range(5))
    return {
        "what": what,
        "batch": batch,
        "ms": seconds * 1e3,
        "tokens_per_second": batch / seconds,
        "limit_ms": (moved + cache) / read * 1e3,
        "weight_bytes": weight_bytes(model),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def decoding(read: float) -> list[Row]:
    rows = []
    for batch in (1, 64):
        plain = decode("8B, bfloat16", QWEN3_8B, float_layers(), batch, read)
        packed = decode("8B, 1 bit", QWEN3_8B, packed_layers(), batch, read)
        packed["ratio"] = plain["ms"] / packed["ms"]
        rows += [plain, packed]
    return rows


def large(read: float) -> list[Row]:
    return [
        decode("70B, 1 bit", LLAMA3_70B, packed_layers(), 1, read),
        decode("70B, 1 bit, symmetric", LLAMA3_70B, packed_layers(symmetric=True), 1, read),
        decode("70B, 1 bit", LLAMA3_70B, packed_layers(), 16, read),
    ]


class Training:
    """Steps of AdamW in bfloat16 autocast, with compiled layers, on random tokens."""

    def __init__(self, qat: bool, batch: int = 16, length: int = 1024) -> None:
        self.model = Decoder(SMOLLM2_135M, float_layers(torch.float32))
        self.model.head.weight = self.model.embedding.weight
        torch.nn.init.normal_(self.model.embedding.weight, std=0.02)
        if qat:
            torch_onebit.prepare_qat_(self.model, group_size=64, progress=False)
        self.model.compile_layers()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.rope = self.model.rope(length)
        self.ids = torch.randint(SMOLLM2_135M.vocabulary, (batch, length + 1), device="cuda")

    def step(self) -> float:
        """Milliseconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        with torch.autocast("cuda", torch.bfloat16):
            logits = self.model(self.ids[:, :-1], self.rope)
            loss = F.cross_entropy(logits.flatten(0, 1), self.ids[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def training(read: float) -> list[Row]:
    """The step with 1-bit weights beside the float one, interleaved."""
    free()
    sides = {"135M step, float": Training(False), "135M step, 1-bit training": Training(True)}
    times = {name: [] for name in sides}
    for i in range(15):
        for name, side in sides.items():
            ms = side.step()
            if i >= 3:
                times[name].append(ms)
    plain, ours = (statistics.median(t) for t in times.values())
    tokens = sides["135M step, float"].ids[:, 1:].numel()
    return [
        {"what": name, "ms": ms, "tokens_per_second": tokens / ms * 1e3, "ratio": plain / ms}
        for name, ms in zip(sides, (plain, ours), strict=True)
    ]


def sharded_logits(mesh: DeviceMesh) -> float:
    """How far the logits of a sharded model are from those of the whole one, of two layers."""
    shape = replace(LLAMA3_70B, layers=2)
    with torch.no_grad():
        torch.manual_seed(0)  # the same bits on every device
        whole = Decoder(shape, packed_layers(), mesh.size()).requires_grad_(False)
        sharded = Decoder(shape, packed_layers()).requires_grad_(False)
        sharded.load_state_dict(whole.state_dict())
        parallelize(sharded, mesh)
        ids, rope = torch.arange(32, device="cuda")[None], whole.rope(32)
        expected = whole(ids, rope).double()
        return float((sharded(ids, rope).double() - expected).norm() / expected.norm())


def all_reduce_us(values: int) -> float:
    """One of 100 in a graph: a decoder has two per layer."""
    x = torch.zeros(values, device="cuda", dtype=torch.bfloat16)
    dist.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(100):
            dist.all_reduce(x)
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 10)
    return statistics.median(times)


def parallel(read: float) -> list[Row]:
    """The largest model on one GPU and on all of them."""
    world, mesh = dist.get_world_size(), dist.init_device_mesh("cuda", (dist.get_world_size(),))
    free()
    error, rows = sharded_logits(mesh), []
    for batch in (1, 16):
        one = decode("70B, 1 bit, one GPU", LLAMA3_70B, packed_layers(), batch, read)
        free()
        with torch.no_grad():
            model = Decoder(LLAMA3_70B, packed_layers()).requires_grad_(False)
            parallelize(model, mesh).compile_layers()
            free()
            decoding = Decoding(model, batch, CONTEXT, world)
            seconds = statistics.median(decoding.seconds(64, CONTEXT // 2) for _ in range(5))
        local = [t.to_local() if isinstance(t, DTensor) else t for t in model.state_dict().values()]
        many = {
            "what": f"70B, 1 bit, {world} GPUs",
            "batch": batch,
            "ms": seconds * 1e3,
            "tokens_per_second": batch / seconds,
            "limit_ms": one["limit_ms"] / world,
            "weight_bytes": sum(t.numel() * t.element_size() for t in local),
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "logits_error": error,
            "all_reduce_us": all_reduce_us(batch * LLAMA3_70B.hidden),
        }
        del model, decoding, local
        rows += [one, many]
    return rows


SECTIONS = {"decoding": decoding, "large": large, "training": training}


def line(row: Row) -> list[str]:
    def get(key: str, form: str, scale: float = 1.0) -> str:
        return format(row[key] * scale, form) if key in row else ""

    return [
        row["what"],
        str(row.get("batch", "")),
        get("ms", ".2f"),
        get("limit_ms", ".2f"),
        get("tokens_per_second", ".0f"),
        get("ratio", ".2f"),
        get("weight_bytes", ".2f", 1e-9),
        get("peak_bytes", ".2f", 1e-9),
    ]


HEADER = [
    "", "batch", "ms a step", "limit of memory, ms", "tokens/s", "ratio to bfloat16", "weights, GB",
    "peak, GB",
]  # fmt: skip


PAGES = {
    "cuda_model.json": ("cuda.md", "cuda models"),
    "cuda_parallel.json": ("distributed.md", "cuda parallel"),
}


def report(name: str) -> None:
    """Write a table between its marks of a page."""
    results = json.loads((RESULTS / name).read_text())
    where = (
        f"{results['device']}, torch {results['torch']}; memory read "
        f"{results['read_bytes_per_second'] / 1e12:.2f} TB/s, context {CONTEXT}."
    )
    page, place = PAGES[name]
    table = pages.table(HEADER, [line(row) for row in results["rows"]])
    pages.put(ROOT / "docs" / page, place, f"{where}\n\n{table}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--report", action="store_true", help="only the pages, from the JSON")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.report:
        for name in PAGES:
            report(name)
        return
    sections, output = SECTIONS, args.output or RESULTS / "cuda_model.json"
    if "RANK" in os.environ:  # by torchrun
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
        sections, output = {"parallel": parallel}, args.output or RESULTS / "cuda_parallel.json"
    results = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "read_bytes_per_second": read_bytes_per_second(),
        "rows": [],
    }
    print(results, flush=True)
    for name in args.sections or sections:
        found = sections[name](results["read_bytes_per_second"])
        if dist.is_initialized() and dist.get_rank() > 0:
            continue
        results["rows"] += found
        for row in found:
            print("  ".join(cell.ljust(26 if i == 0 else 10) for i, cell in enumerate(line(row))))
        sys.stdout.flush()
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
