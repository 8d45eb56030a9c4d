"""Memory of a packed model that was loaded, beside the size of its file.

    python benchmarks/bench_memory.py --shape 1.7B

A Qwen3 of random weights is packed and saved; a new process loads it, and prepacks it. Resident
memory is what the process has more than before it loaded, as Linux counts it; the peak is the most
that it had meanwhile.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_llama import SHAPES, random_model

import torch_onebit


def kilobytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


def child(path: Path) -> None:
    """Load, and print what it took."""
    import transformers  # noqa: F401  # before the first look at memory

    size = sum(f.stat().st_size for f in path.glob("*.safetensors")) / 1e6
    gc.collect()
    before = kilobytes("VmRSS")

    def row(what: str) -> str:
        gc.collect()
        now, most = (kilobytes(name) - before for name in ("VmRSS", "VmHWM"))
        return f"| {what} | {now / 1e3:.0f} | {now / 1e3 / size:.2f} | {most / 1e3 / size:.2f} |"

    print(f"file: {size:.0f} MB\n\n| | resident, MB | of the file | peak, of the file |")
    print("|---|---|---|---|")
    model = torch_onebit.load_checkpoint(path, progress=False)
    print(row("loaded: mapped, not yet read"))
    with torch.inference_mode():
        model(torch.tensor([[1]]), use_cache=False)
        print(row("after a token"))
        torch_onebit.prepack_(model, progress=False)
        model(torch.tensor([[1]]), use_cache=False)
    print(row("after prepack_ and a token"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.7B")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        child(args.load)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(SHAPES[args.shape], args.layers)
        torch_onebit.save_checkpoint(model, Path(folder) / "model", config=model.config.to_dict())
        del model
        load = [sys.executable, __file__, "--load", str(Path(folder) / "model")]
        subprocess.run(load, check=True)


if __name__ == "__main__":
    main()
