"""Decoding with an AOTInductor package, from C++ and from Python, beside torch.compile.

    python benchmarks/bench_aoti.py --shape 1.7B

A Qwen3 of random weights, packed in groups of 128, prepacked, with a static cache, is packaged as
examples/aoti/package_decoder.py does it; examples/aoti/decode.cpp is compiled and runs the package,
as Python does, and the same model compiled. Single tokens after a prompt of 512, in turns.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_llama import PROMPT, SHAPES, random_model

import torch_onebit
from torch_onebit._load import EXTENSION

EXAMPLE = Path(__file__).parent.parent / "examples" / "aoti"


class FromPython:
    """Greedy tokens by a function of a token and its position."""

    def __init__(self, step) -> None:
        self.step = step

    def milliseconds(self, count: int) -> tuple[float, list[int]]:
        """Of a token, and the tokens."""
        tokens, token = [], 1
        start = time.perf_counter()
        for i in range(count):
            token = int(self.step(torch.tensor([[token]]), torch.tensor([[PROMPT + i]])).argmax())
            tokens.append(token)
        return (time.perf_counter() - start) / count * 1e3, tokens


class FromCpp:
    def __init__(self, folder: Path, path: str) -> None:
        torch_folder = Path(torch.__file__).parent
        program = folder / "decode"
        command = ["g++", "-O2", "-std=c++20", EXAMPLE / "decode.cpp", "-o", program]
        search = [f"-I{torch_folder}/include", f"-L{torch_folder}/lib"]
        search += [f"-Wl,-rpath,{torch_folder}/lib", "-Wl,--no-as-needed"]
        subprocess.run([*command, *search, "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"], check=True)
        library = Path(torch_onebit.__path__[0]) / EXTENSION
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([program, library, path], **pipes)

    def milliseconds(self, count: int) -> tuple[float, list[int]]:
        self.process.stdin.write(f"1 {PROMPT} {count}\n")
        self.process.stdin.flush()
        first, *tokens = self.process.stdout.readline().split()
        return float(first), [int(token) for token in tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.7B")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16, help="of a round")
    args = parser.parse_args()
    sys.path.append(str(EXAMPLE))
    from package_decoder import Step, package

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = torch_onebit.prepack_(random_model(SHAPES[args.shape], args.layers))
        model.set_attn_implementation("grouped_keys")
        path, step = str(Path(folder) / "decoder.pt2"), Step(model, PROMPT + 64)
        start = time.perf_counter()
        package(step, path)
        size = Path(path).stat().st_size / 1e6
        print(f"{size:.0f} MB, packaged in {time.perf_counter() - start:.0f} s", flush=True)
        sides = {
            "torch.compile": FromPython(torch.compile(step, fullgraph=True)),
            "package, Python": FromPython(torch._inductor.aoti_load_package(path)),
            "package, C++": FromCpp(Path(folder), path),
        }
        times = {name: [] for name in sides}
        for lap in range(args.rounds + 1):
            answers = {name: side.milliseconds(args.tokens) for name, side in sides.items()}
            if answers["package, Python"][1] != answers["package, C++"][1]:
                raise SystemExit(f"tokens must be the same from both languages, got {answers}")
            for name, (milliseconds, _) in answers.items():
                if lap > 0:  # the first compiles
                    times[name].append(milliseconds)
    print(f"\n{torch.get_num_threads()} threads\n")
    print("| | tokens/s | ms, least | over torch.compile |\n|---|---|---|---|")
    for name, mine in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["torch.compile"], mine, strict=True))
        print(f"| {name} | {1e3 / statistics.median(mine):.1f} | {min(mine):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
