"""The AOTInductor example of docs/deploy.md: packaged once, run from Python and from C++."""

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


def test_package_runs_from_cpp(packaged, tmp_path):
    model, path = packaged
    program = str(tmp_path / "main")
    command = [os.environ.get("CXX", "g++"), "-std=c++20", str(EXAMPLE / "main.cpp"), "-o", program]
    search = [f"-I{TORCH}/include", f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib"]
    subprocess.run([*command, *search, "-Wl,--no-as-needed", *LINK], check=True)
    library = Path(torch_onebit.__path__[0]) / EXTENSION
    run = subprocess.run([program, library, path], capture_output=True, text=True, check=True)
    answers = [[float(value) for value in line.split()] for line in run.stdout.splitlines()]
    expected = model(package.tokens()).detach().flatten(0, 1)
    torch.testing.assert_close(torch.tensor(answers), expected, rtol=0, atol=1e-4)
