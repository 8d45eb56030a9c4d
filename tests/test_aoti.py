"""The AOTInductor examples of docs/deploy.md: packaged once, run from Python and from C++."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_onebit
from torch_onebit._load import EXTENSION

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "aoti"))
import package
from prepacked_layers import needs_kernel

EXAMPLE = Path(package.__file__).parent
TORCH = Path(torch.__file__).parent
LINK = ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("aoti") / "model.pt2")
    return package.package(path), path


@pytest.mark.parametrize("rows", [3, 1, 9])
def test_package_runs_from_python(packaged, rows):
    model, path = packaged
    x = torch.randint(0, 16, (rows, 2))
    with torch.no_grad():
        loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(loaded(x), model(x))


def run_cpp(source: str, path: str, folder: Path, given: str = "") -> list[list[float]]:
    """The numbers that a program of the examples prints, by line."""
    program = str(folder / "main")
    command = [os.environ.get("CXX", "g++"), "-std=c++20", str(EXAMPLE / source), "-o", program]
    search = [f"-I{TORCH}/include", f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib"]
    subprocess.run([*command, *search, "-Wl,--no-as-needed", *LINK], check=True)
    command = [program, Path(torch_onebit.__path__[0]) / EXTENSION, path]
    run = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    return [[float(value) for value in line.split()] for line in run.stdout.splitlines()]


def test_package_runs_from_cpp(packaged, tmp_path):
    model, path = packaged
    answers = run_cpp("main.cpp", path, tmp_path)
    expected = model(package.tokens()).detach().flatten(0, 1)
    torch.testing.assert_close(torch.tensor(answers), expected, rtol=0, atol=1e-4)


@needs_kernel
def test_prepacked_decoder_runs_from_cpp(tmp_path):
    transformers = pytest.importorskip("transformers")
    import package_decoder

    config = transformers.Qwen3Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch_onebit.prepack_(torch_onebit.quantize_(model, skip=["embed_tokens"]))
    step, path = package_decoder.Step(model, 8), str(tmp_path / "decoder.pt2")
    package_decoder.package(step, path)
    loaded, token, tokens = torch._inductor.aoti_load_package(path), 7, []
    with torch.no_grad():
        for position in range(5):
            x = torch.tensor([[token]]), torch.tensor([[position]])
            logits = step(*x)
            torch.testing.assert_close(loaded(*x), logits)
            token = int(logits.argmax())
            tokens.append(token)
    lines = run_cpp("decode.cpp", path, tmp_path, "7 0 5\n" * 2)
    assert [line[1:] for line in lines] == [tokens, tokens]
