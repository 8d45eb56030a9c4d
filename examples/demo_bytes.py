"""From float32 to a 1-bit model that generates text, on this machine, in a few minutes.

Trains a byte-level transformer, makes it 1-bit by calibration alone and by training on with 1-bit
weights, packs those, saves, and reloads in a fresh process that generates with torch.compile. Fails
if the reloaded or compiled model disagrees.

    python examples/demo_bytes.py [--folder out/demo_bytes]
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from byte_lm import ByteLM, Config, evaluate, generate, load_text, random_batches, train
from safetensors.torch import load_file, save_file
from torch import Tensor

import torch_onebit

CONFIG = Config()
GROUP_SIZE = 64
PROMPT = b'def main(argv):\n    """'
HOW_TO_READ = """
How to read it
  validation loss   on files that no step saw; guessing at random: 5.55. The 1-bit model had
                    {args.onebit_steps} steps more than float32 and so may come out ahead:
                    docs/which_method.md compares with float32 trained equally long
  tokens/s          one token at a time, one thread
  logits            reloaded: in a fresh process, as saved; compiled: by torch.compile there

Files: {args.folder}/float32.safetensors, onebit.safetensors, figures.json
Next:  docs/which_method.md for your own model"""
# Logits span about 20; inductor reorders float32 sums, 1e-5 was seen.
TOLERANCE = 1e-3


def calibrated(model: ByteLM, text: Tensor) -> ByteLM:
    """A 1-bit copy of a float model, without training: calibrated on a few batches of its text."""
    copied = copy.deepcopy(model)
    batches = random_batches(text, CONFIG.context, batch=16, count=8, seed=2)
    torch_onebit.calibrate_(copied, [tokens for tokens, _ in batches], group_size=GROUP_SIZE)
    print(torch_onebit.report(copied))
    return copied


def train_one_bit(model: ByteLM, teacher: ByteLM, text: Tensor, steps: int) -> None:
    """Train a calibrated model on, the float one as its teacher, and pack it again, in place."""
    torch_onebit.prepare_qat_(model, method="learnable")
    train(
        model,
        text,
        context=CONFIG.context,
        batch=16,
        steps=steps,
        learning_rate=2e-3,
        loss_fn=torch_onebit.Distillation(teacher, weight=0.5),
        seed=1,
        title="train 1-bit",
    )
    torch_onebit.convert_(model)


def reload(folder: Path, onebit: bool) -> ByteLM:
    """Read a saved model into a new one."""
    model = ByteLM(CONFIG)
    if onebit:
        torch_onebit.quantize_(model, group_size=GROUP_SIZE)
    model.load_state_dict(load_file(folder / f"{name_of(onebit)}.safetensors"))
    return model.eval()


def name_of(onebit: bool) -> str:
    return "onebit" if onebit else "float32"


def tokens_per_second(model: ByteLM, decode) -> float:
    """Median over 5 generations of a full context, batch 1."""
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        generate(model, PROMPT, CONFIG.context, decode=decode)
        rates.append(CONFIG.context / (time.perf_counter() - start))
    return statistics.median(rates)


def run_in_fresh_process(folder: Path) -> None:
    """Reload both models, generate eagerly and compiled; write figures.json and logits."""
    torch.set_num_threads(1)  # a token's products are too small to share
    reference = load_file(folder / "reference.safetensors")
    text = bytes(reference["text"].tolist())
    figures: dict[str, dict] = {}
    for onebit in (False, True):
        model = reload(folder, onebit)
        in_memory = reference[name_of(onebit)]
        start = time.perf_counter()
        compiled = torch.compile(model.decode, fullgraph=True, dynamic=False)
        _, eager_logits = generate(model, text, len(text))
        _, compiled_logits = generate(model, text, len(text), decode=compiled)
        compile_seconds = time.perf_counter() - start
        sample, _ = generate(model, PROMPT, CONFIG.context, decode=compiled, temperature=0.8)
        figures[name_of(onebit)] = {
            "reloaded": float((eager_logits - in_memory).abs().max()),
            "compiled": float((compiled_logits - in_memory).abs().max()),
            "compile_seconds": compile_seconds,
            "eager_rate": tokens_per_second(model, None),
            "compiled_rate": tokens_per_second(model, compiled),
            "sample": sample.decode("utf-8", "replace"),
        }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("out/demo_bytes"))
    parser.add_argument("--steps", type=int, default=600, help="float32 steps")
    parser.add_argument("--onebit-steps", type=int, default=280)
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reload:
        return run_in_fresh_process(args.folder)
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    print("Training a small model, then in 1 bit: about 4 minutes on 2 quiet cores.")
    text, validation = load_text()
    print(f"{len(text) / 1e6:.1f} MB of Python sources, {len(validation) / 1e6:.1f} MB held out")
    check = bytes(validation[1000 : 1000 + CONFIG.context].tolist())
    reference = {"text": torch.tensor(list(check))}
    losses = {}

    model = ByteLM(CONFIG)
    train(
        model,
        text,
        context=CONFIG.context,
        batch=16,
        steps=args.steps,
        learning_rate=4e-3,
        title="train float32",
    )
    onebit = calibrated(model, text)
    losses["calibrated"] = evaluate(onebit, validation, CONFIG.context)
    train_one_bit(onebit, model, text, args.onebit_steps)
    models = {"float32": model, "onebit": onebit}
    losses |= {name: evaluate(m, validation, CONFIG.context) for name, m in models.items()}
    torch.set_num_threads(1)  # as the fresh process: sums in another order would not be equal
    for name, trained in models.items():
        reference[name] = generate(trained, check, len(check))[1]
        save_file(trained.state_dict(), args.folder / f"{name}.safetensors")
    save_file(reference, args.folder / "reference.safetensors")

    print("reloading both in a fresh process, compiling ...", flush=True)
    command = [sys.executable, __file__, "--reload", "--folder", str(args.folder)]
    subprocess.run(command, check=True)
    figures = json.loads((args.folder / "figures.json").read_text())
    print_table(args.folder, losses, figures)
    print(HOW_TO_READ.format(args=args))
    worst = max(max(f["reloaded"], f["compiled"]) for f in figures.values())
    if not worst <= TOLERANCE or figures["onebit"]["reloaded"] != 0:
        sys.exit(
            f"FAILED: the models differ by up to {worst:.2e} (allowed: {TOLERANCE}, reloaded: 0)"
        )


def print_table(folder: Path, losses: dict[str, float], figures: dict[str, dict]) -> None:
    names = ("float32", "onebit")
    sizes = {name: (folder / f"{name}.safetensors").stat().st_size for name in names}
    rows = [
        ("validation loss, nats per byte", [f"{losses[n]:.3f}" for n in names]),
        ("bytes on disk", [f"{sizes[n]:,}" for n in names]),
        ("tokens/s, eager", [f"{figures[n]['eager_rate']:,.0f}" for n in names]),
        ("tokens/s, torch.compile", [f"{figures[n]['compiled_rate']:,.0f}" for n in names]),
        ("logits, reloaded - in memory", [f"{figures[n]['reloaded']:.1e}" for n in names]),
        ("logits, compiled - in memory", [f"{figures[n]['compiled']:.1e}" for n in names]),
    ]
    after = losses["calibrated"]
    rows.insert(1, ("the same, calibrated, not trained", ["", f"{after:.3f}"]))
    print(f"\n--- the 1-bit model writes ---\n{figures['onebit']['sample']}\n")
    print(f"{'':34}{'float32':>14}{'1-bit':>14}")
    for label, cells in rows:
        print(f"{label:34}" + "".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
