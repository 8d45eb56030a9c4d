"""Weights of mapped files are in memory once: in the file's pages, or in what replaced them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prepacked_layers import needs_kernel
from torch import Tensor, nn

from torch_onebit import (
    OneBitEmbedding,
    OneBitLinear,
    export_gguf,
    load_checkpoint,
    load_gguf,
    quantize_,
    save_checkpoint,
)
from torch_onebit.mapped import release_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
N = 512  # 32 KB of words


def resident(path: Path) -> float:
    """Bytes of this process that are pages of a file."""
    here, kilobytes = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].count("-") == 1:
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            kilobytes += int(line.split()[1])
    return kilobytes * 1024


def save(path: Path, size: int) -> None:
    layers = [OneBitLinear(size, size, bias=False, dtype=torch.bfloat16) for _ in range(8)]
    rows = OneBitEmbedding(8, size, dtype=torch.bfloat16)  # it keeps the file mapped
    save_checkpoint(nn.Sequential(rows, *layers), path, config={})


@pytest.fixture
def saved(tmp_path) -> Path:
    save(tmp_path, N)
    return tmp_path


def loaded(saved: Path) -> nn.Sequential:
    with torch.device("meta"):
        layers = [nn.Linear(N, N, bias=False) for _ in range(8)]
        model = nn.Sequential(nn.Embedding(8, N), *layers)
    return load_checkpoint(saved, model).eval()


@needs_kernel
def test_prepacked_layers_leave_the_file(saved):
    model = loaded(saved)
    x = torch.tensor([1, 3])
    expected, file = model(x), saved / "model.safetensors"
    assert resident(file) > 0.9 * file.stat().st_size
    for layer in model[1:]:
        layer.prepack()
    assert resident(file) < 0.5 * file.stat().st_size  # the ends of tensors, and pages read ahead
    torch.testing.assert_close(model(x), expected)


def edited(t: Tensor) -> Tensor:
    t.view(-1)[t.numel() // 2] = 7
    return t


TENSORS = {
    "of a file": lambda t: t,
    "of a file, written to": edited,
    "of no file": torch.clone,
    "less than a page": lambda t: t[:1],
    "no rows": lambda t: t[:0],
    "columns, which share their pages": lambda t: t[:, :3],
    "on meta": lambda t: t.to("meta"),
    "shared memory": lambda t: edited(t.clone().share_memory_()),
}


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_released_tensors_keep_their_values(make, saved):
    tensor = make(loaded(saved)[1].weight)
    before = tensor.clone()
    release_pages(tensor)
    assert tensor.is_meta or torch.equal(tensor, before)


@needs_kernel
def test_whoever_wrote_to_a_replaced_weight_keeps_it(saved):
    layer = loaded(saved)[1]
    alias = edited(layer.weight)
    expected = alias.clone()
    layer.prepack()
    assert torch.equal(alias, expected) and torch.equal(layer.weight, expected)


RESIDENT = """
import sys
from pathlib import Path
import torch
from torch import nn
import safetensors.torch
from torch_onebit import load_checkpoint, prepack_
def kilobytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])
with torch.device("meta"):
    layers = [nn.Linear(8192, 8192, bias=False) for _ in range(8)]
    model = nn.Sequential(nn.Embedding(8, 8192), *layers)
before = kilobytes()
model = prepack_(load_checkpoint(sys.argv[1], model))
with torch.inference_mode():
    model(torch.tensor([1]))
print(kilobytes() - before)
"""


@needs_kernel
def test_a_loaded_and_prepacked_model_is_as_large_as_its_file(tmp_path):
    save(tmp_path, 8192)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 80e6
    command = [sys.executable, "-c", RESIDENT, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.95 * size < 1024 * int(run.stdout) < 1.15 * size


def test_a_gguf_file_leaves_memory_as_it_is_unpacked(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=1
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    export_gguf(quantize_(model, symmetric=True, method="sign", skip=[]), tmp_path / "m.gguf")
    model = load_gguf(tmp_path / "m.gguf")  # its vectors are views of the file
    assert 0 < resident(tmp_path / "m.gguf") < 0.3 * (tmp_path / "m.gguf").stat().st_size
