"""A real pretrained model in one bit per weight: what it loses, how small and how fast it gets.

Downloads AntiBERTy, a BERT of 26 million parameters, makes the linear layers of its encoder 1-bit
by calibration, trains their levels for a moment, saves, and reloads the file in a fresh process,
which fails if the model differs. Without a network it runs demo_bytes.py instead.

    python examples/demo.py [--folder out/demo]
"""

import argparse
import copy
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import antibody
import torch
from antibody import Masking, evaluate, load_model, load_sequences, masked_loss
from safetensors.torch import load_model as read_file
from safetensors.torch import save_model as write_file
from torch import nn
from tqdm import tqdm

import torch_onebit

MINUTES = 4  # and 4 more of set-up, the first time
PHASES = 7
GROUP_SIZE = 128
CALIBRATION = 64  # sequences
HELD_OUT = 96
# At 2e-3, a twentieth of a scale a step, the loss rises: 0.85 to 0.99.
STEPS, BATCH, LEARNING_RATE = 60, 8, 3e-4
METHODS = {
    "float32": "as it was published",
    "quantize_": "no data: the nearest 1-bit weights",
    "calibrate_": f"the nearest outputs on {CALIBRATION} sequences",
    "trained": f"then {STEPS} steps of training the levels and norms",
}


class Phases:
    """Announces each part of the work and says how long it took."""

    def __init__(self) -> None:
        self.number = 0

    @contextmanager
    def __call__(self, what: str):
        self.number += 1
        print(f"\n[{self.number}/{PHASES}] {what} ...", flush=True)
        begin = time.perf_counter()
        yield
        print(f"      {time.perf_counter() - begin:.0f} s", flush=True)


def in_encoder(module: nn.Module, name: str) -> bool:
    """The embedding and the head are small and would cost the most."""
    return name.startswith("bert.encoder.")


def train_levels(model: nn.Module, masking: Masking, sequences: list[str]) -> None:
    """Train scales, biases and norms; the bits stay."""
    model.requires_grad_(False)
    torch_onebit.thaw_levels_(model)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    generator = torch.Generator().manual_seed(2)
    for _ in (bar := tqdm(range(STEPS), desc="      train", unit="step")):
        chosen = torch.randint(len(sequences), (BATCH,), generator=generator).tolist()
        inputs, targets = masking.batch([sequences[i] for i in chosen], generator)
        loss = masked_loss(model(**inputs).logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    model.requires_grad_(False)


def reload_in_this_process(folder: Path, packages: Path) -> None:
    """Read the file into a new model, compare with the logits of the old, time it; one thread."""
    torch.set_num_threads(1)
    model = antibody.empty_model(packages)
    torch_onebit.quantize_(
        model, group_size=GROUP_SIZE, method="minmax", filter_fn=in_encoder, progress=False
    )
    read_file(model, folder / "onebit.safetensors")
    reference = torch.load(folder / "reference.pt")
    models = {"float32": load_model(packages), "1 bit": model}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        logits = model(**reference["inputs"]).logits
        for _ in range(15):
            for name, timed in models.items():
                begin = time.perf_counter()
                timed(**reference["one"])
                seconds[name].append(time.perf_counter() - begin)
    figures = {
        "difference": float((logits - reference["logits"]).abs().max()),
        "seconds": {name: statistics.median(times[2:]) for name, times in seconds.items()},
    }
    (folder / "figures.json").write_text(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("out/demo"))
    parser.add_argument("--packages", type=Path, default=Path("out/packages"))
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reload:
        return reload_in_this_process(args.folder, args.packages)
    args.folder.mkdir(parents=True, exist_ok=True)
    args.packages.mkdir(parents=True, exist_ok=True)
    print(f"A pretrained model in one bit per weight: about {MINUTES} minutes on 2 quiet cores.")
    phase = Phases()
    with phase(f"downloading {' and '.join(antibody.PACKAGES)}, 97 MB, into {args.packages}"):
        ready = antibody.download(args.packages)
    if not (ready and importlib.util.find_spec("transformers")):
        missing = "transformers is not installed" if ready else "the packages cannot be had"
        print(f"\n{missing}: this demo trains a small model of its own instead.\n")
        other = Path(__file__).with_name("demo_bytes.py")
        subprocess.run([sys.executable, other, "--folder", args.folder], check=True)
        return
    run(args.folder, args.packages, phase)


def run(folder: Path, packages: Path, phase: Phases) -> None:
    torch.manual_seed(0)
    figures: dict[str, tuple[float, float, int]] = {}
    with phase("loading the model and the sequences, float32 evaluated"):
        model = load_model(packages)
        training, held_out = load_sequences(packages)
        masking = Masking(packages)
        test = masking.batches(held_out[:HELD_OUT], 16, seed=0)
        figures["float32"] = tell(evaluate(model, test))
        print(f"      {len(training)} antibodies to learn from, {HELD_OUT} to test on")
    with phase("quantize_: 1 bit without data, for comparison"):
        nearest = copy.deepcopy(model)
        torch_onebit.quantize_(nearest, group_size=GROUP_SIZE, filter_fn=in_encoder, progress=False)
        figures["quantize_"] = tell(evaluate(nearest, test))
    with phase(f"calibrate_: {CALIBRATION} sequences, 48 layers"):
        batches = masking.batches(training[:CALIBRATION], 16, seed=1)
        torch_onebit.calibrate_(
            model,
            [inputs for inputs, _ in batches],
            group_size=GROUP_SIZE,
            filter_fn=in_encoder,
            options=torch_onebit.CalibrationOptions(rounds=2),
        )
        figures["calibrate_"] = tell(evaluate(model, test))
    with phase("training the levels and norms; the bits stay as they are"):
        train_levels(model, masking, training)
        figures["trained"] = tell(evaluate(model, test))
    with phase("saving"):
        save(model, folder, test)
    with phase("reloading in a fresh process, timing one sequence on one thread"):
        paths = ["--folder", str(folder), "--packages", str(packages)]
        subprocess.run([sys.executable, __file__, "--reload", *paths], check=True)
    found = json.loads((folder / "figures.json").read_text())
    report(folder, packages, figures, found["seconds"])
    if found["difference"] != 0:
        sys.exit(f"FAILED: the reloaded model differs by {found['difference']:.1e}")


def tell(figures: tuple[float, float, int]) -> tuple[float, float, int]:
    loss, right, count = figures
    print(
        f"      {right:.1%} of {count:,} hidden residues guessed right, loss {loss:.3f}", flush=True
    )
    return figures


def save(model: nn.Module, folder: Path, test: list) -> None:
    """The model, and what the fresh process compares it with."""
    write_file(model, str(folder / "onebit.safetensors"))
    inputs = test[0][0]
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the fresh process: the sums of torch's own layers depend on it
    with torch.inference_mode():
        logits = model(**inputs).logits
    torch.set_num_threads(threads)
    torch.save({"inputs": inputs, "one": one, "logits": logits}, folder / "reference.pt")


def report(
    folder: Path,
    packages: Path,
    figures: dict[str, tuple[float, float, int]],
    seconds: dict[str, float],
) -> None:
    """The table, how to read it, where the files are and what comes next."""
    before = (packages / antibody.CHECKPOINT / "pytorch_model.bin").stat().st_size
    after = (folder / "onebit.safetensors").stat().st_size
    print(f"\n{'':12}{'guessed right':>14}{'loss, nats':>12}")
    for name, note in METHODS.items():
        loss, right, count = figures[name]
        print(f"{name:12}{right:>13.1%} {loss:>12.3f}   {note}")
    print(f"\n{'':12}{'file':>14}{'one sequence':>14}")
    print(f"{'float32':12}{before / 1e6:>11.1f} MB{seconds['float32'] * 1e3:>11.1f} ms")
    print(f"{'1 bit':12}{after / 1e6:>11.1f} MB{seconds['1 bit'] * 1e3:>11.1f} ms")
    print(
        f"""
How to read it
  guessed right   of {count:,} residues hidden in {HELD_OUT} antibodies that nothing was fitted to
  loss            mean over the same residues of -log(probability of the right one); one of 20 at
                  random: 3.00. "trained" saw {STEPS * BATCH} sequences more than float32 did
  file            {before / after:.0f} times smaller: the encoder's 25 million weights take 1.5 bits
                  with float32 levels; embeddings, head, norms and biases stay float32
  one sequence    a forward pass on one thread, median of 13, both models in turns

Files
  {folder / "onebit.safetensors"}   the 1-bit model; the fresh process read it: the same logits
  {packages / antibody.CHECKPOINT}   the float32 model

Next
  your own model     the same three calls as in run() of examples/demo.py
  which method       docs/which_method.md
  from scratch       python examples/demo_bytes.py"""
    )


if __name__ == "__main__":
    main()
