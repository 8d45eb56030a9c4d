"""What each way to one bit is worth: losses of a byte-level language model, over fixed seeds.

    python benchmarks/bench_training.py --protocol short            # 3 seeds, about 25 minutes
    python benchmarks/bench_training.py --protocol long             # 1 seed, about 20 minutes
    python benchmarks/bench_training.py --protocol short --report   # tables and plots from the JSON

A protocol trains a float32 model, then quantizes it in several ways and trains each, and the
float32 model too, equally long. Results go to benchmarks/results/ after every variant: a run that
was stopped goes on where it was. Exits with 1 when a bar is missed.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import training_report  # noqa: E402
from byte_lm import ByteLM, Config, evaluate, load_text, random_batches, train  # noqa: E402

import torch_onebit  # noqa: E402


@dataclass(frozen=True)
class Protocol:
    """Linear layers of the blocks become 1-bit; head and embedding stay float32."""

    config: Config
    group_size: int
    steps: int  # of the float32 model that everything starts from
    more_steps: int  # of every variant that trains
    seeds: tuple[int, ...]
    batch: int = 32
    learning_rate: float = 4e-3
    more_learning_rate: float = 2e-3  # of float32 and of QAT from its weights
    calibration_batches: int = 32


PROTOCOLS = {
    "short": Protocol(Config(128, 2, 4, 64), 32, 800, 200, (0, 1, 2)),
    # 950 steps: 1.50 nats, where the figures that the bars come from started (1.52).
    "long": Protocol(Config(128, 4, 4, 64), 64, 950, 300, (0,)),
}


@dataclass
class Outcome:
    loss: float  # validation, nats per byte
    curve: list[float] = field(default_factory=list)  # training loss per step
    trained: int = 0  # parameters
    converted: float | None = None  # loss after packing with float16 levels
    seconds: float = 0.0


class Bench:
    """One seed of one protocol: the text, the float32 model, and how to train from it."""

    def __init__(self, protocol: Protocol, seed: int, cache: Path) -> None:
        self.protocol = protocol
        self.seed = seed
        self.text, self.validation = load_text()
        self.path = cache / f"{protocol.config.layers}-{protocol.steps}-{seed}.pt"

    def start(self) -> ByteLM:
        """A copy of the float32 model, trained on the first call."""
        p = self.protocol
        torch.manual_seed(self.seed)
        model = ByteLM(p.config)
        if self.path.exists():
            model.load_state_dict(torch.load(self.path))
            return model
        train(
            model,
            self.text,
            context=p.config.context,
            batch=p.batch,
            steps=p.steps,
            learning_rate=p.learning_rate,
            seed=self.seed,
            title=f"float32, seed {self.seed}",
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), self.path)
        return model

    def train_on(self, model: nn.Module, **options) -> Outcome:
        """Train every parameter that requires grad for the protocol's further steps."""
        p = self.protocol
        trained = sum(t.numel() for t in model.parameters() if t.requires_grad)
        curve = train(
            model,
            self.text,
            context=p.config.context,
            batch=p.batch,
            steps=p.more_steps,
            seed=1000 + self.seed,
            **{"learning_rate": p.more_learning_rate, **options},
        )
        return Outcome(self.evaluate(model), curve, trained)

    def evaluate(self, model: nn.Module) -> float:
        return evaluate(model, self.validation, self.protocol.config.context, count=1024)

    def calibrated(self, lora_rank: int = 0) -> ByteLM:
        """The float32 model calibrated, on the first call; layers are kept beside the model."""
        p = self.protocol
        model = self.start()
        count = p.calibration_batches
        batches = random_batches(self.text, p.config.context, batch=p.batch, count=count, seed=77)
        inputs = [tokens for tokens, _ in batches]
        torch_onebit.calibrate_(
            model,
            inputs,
            group_size=p.group_size,
            filter_fn=in_blocks,
            lora_rank=lora_rank,
            checkpoint=self.path.with_suffix(f".calibrated{lora_rank}"),
        )
        print(torch_onebit.report(model))
        return model

    def from_calibrated(self) -> dict[str, float]:
        """Options of training from calibrated bits: the float model's own rate, no decay."""
        return {"learning_rate": self.protocol.learning_rate, "weight_decay": 0.0}

    def distillation(self) -> torch_onebit.Distillation:
        return torch_onebit.Distillation(self.start(), weight=0.5)


def in_blocks(module: nn.Module, name: str) -> bool:
    return name.startswith("blocks.")


def float32(bench: Bench) -> Outcome:
    return Outcome(bench.evaluate(bench.start()))


def float32_longer(bench: Bench) -> Outcome:
    return bench.train_on(bench.start())


def calibrated(lora_rank: int = 0) -> Callable[[Bench], Outcome]:
    return lambda bench: Outcome(bench.evaluate(bench.calibrated(lora_rank)))


def ptq(method: str) -> Callable[[Bench], Outcome]:
    def run(bench: Bench) -> Outcome:
        group_size = bench.protocol.group_size
        model = torch_onebit.quantize_(
            bench.start(), method=method, group_size=group_size, filter_fn=in_blocks
        )
        return Outcome(bench.evaluate(model))

    return run


def qat(rule: str, *, start: str = "float32", distill: bool = False) -> Callable[[Bench], Outcome]:
    """QAT of the float32 model, or of the calibrated one: bits, levels and all the rest."""

    def run(bench: Bench) -> Outcome:
        model = bench.start() if start == "float32" else bench.calibrated()
        torch_onebit.prepare_qat_(
            model, method=rule, group_size=bench.protocol.group_size, filter_fn=in_blocks
        )
        loss_fn = bench.distillation() if distill else None
        # Targets alone are too noisy for that rate: 0.008 nats worse.
        recipe = bench.from_calibrated() if start == "calibrated" and distill else {}
        result = bench.train_on(model, loss_fn=loss_fn, **recipe)
        result.converted = bench.evaluate(torch_onebit.convert_(model, dtype=torch.float16))
        return result

    return run


def frozen_bits(rank: int, distill: bool = False) -> Callable[[Bench], Outcome]:
    """Calibrated bits stay; scales, biases and LoRA of this rank are trained, and nothing else."""

    def run(bench: Bench) -> Outcome:
        model = bench.calibrated(rank).requires_grad_(False)
        torch_onebit.thaw_levels_(model)
        torch_onebit.thaw_lora_(model)
        loss_fn = bench.distillation() if distill else None
        return bench.train_on(model, loss_fn=loss_fn, **bench.from_calibrated())

    return run


VARIANTS: dict[str, Callable[[Bench], Outcome]] = {
    "float32": float32,
    "float32, equally long": float32_longer,
    "PTQ minmax": ptq("minmax"),
    "PTQ sign": ptq("sign"),
    "PTQ optimal": ptq("optimal"),
    "PTQ calibrated": calibrated(),
    "PTQ calibrated + LoRA 8": calibrated(8),
    "QAT mean": qat("mean"),
    "QAT mean, distilled": qat("mean", distill=True),
    "calibrated, QAT learnable": qat("learnable", start="calibrated"),
    "calibrated, QAT learnable, distilled": qat("learnable", start="calibrated", distill=True),
    "QAT sign": qat("sign"),
    "QAT optimal": qat("optimal"),
    "calibrated, levels": frozen_bits(0),
    "calibrated, levels + LoRA 8": frozen_bits(8),
    "calibrated, levels + LoRA 8, distilled": frozen_bits(8, distill=True),
}


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def run_seed(protocol: Protocol, seed: int, path: Path, args: argparse.Namespace) -> None:
    """Run the variants that path does not hold yet."""
    results = json.loads(path.read_text()) if path.exists() else {"variants": {}}
    bench = Bench(protocol, seed, args.cache)
    for name in args.variants:
        if name in results["variants"]:
            continue
        bench.start()  # training it is no variant's time
        begin = time.perf_counter()
        result = VARIANTS[name](bench)
        result.seconds = time.perf_counter() - begin
        results["seed"] = seed
        results["protocol"] = asdict(protocol)
        results["machine"] = f"{platform.system()} {platform.machine()}, {args.threads} thread(s)"
        results["versions"] = {"torch": torch.__version__, "commit": commit()}
        done = {**results["variants"], name: asdict(result)}
        results["variants"] = {name: done[name] for name in VARIANTS if name in done}
        path.write_text(json.dumps(results, indent=1))
        print(f"{name}, seed {seed}: {result.loss:.4f} ({result.seconds:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--protocol", choices=PROTOCOLS, default="short")
    parser.add_argument("--seeds", type=int, nargs="*")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=ROOT / "out" / "bench_training")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--report", action="store_true", help="only tables, plots and docs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.results.mkdir(parents=True, exist_ok=True)
    protocol = PROTOCOLS[args.protocol]
    if not args.report:
        for seed in protocol.seeds if args.seeds is None else args.seeds:
            path = args.results / f"training_{args.protocol}_seed{seed}.json"
            run_seed(protocol, seed, path, args)
    met = training_report.write(args.protocol, args.results, ROOT)
    sys.exit(0 if met or args.report else 1)


if __name__ == "__main__":
    main()
