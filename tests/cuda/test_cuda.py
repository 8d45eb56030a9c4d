"""What only a GPU can show: kernels on structured inputs, streams, graphs, the cache on disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import FLOATS, GROUP_SIZES
from helpers import make_weights
from torch import Tensor

import torch_onebit
from torch_onebit import OneBitLinear

ops = torch.ops.onebit
pytestmark = pytest.mark.cuda
ROOT = Path(__file__).parents[2]


# x by name: what would show that a kernel trades accuracy for an easy distribution of x.
def with_outlier(power: int):
    def make(x: Tensor) -> Tensor:
        x[:, ::128] = 2.0**power
        return x

    return make


STRUCTURED = {
    "normal": lambda x: x,
    "constant": lambda x: torch.full_like(x, 0.7),
    "half zeros, as after ReLU": lambda x: x.relu(),
    "mostly zeros": lambda x: x * (torch.rand_like(x) > 0.95),
    "tiny": lambda x: x * 2.0**-20,
    "of many magnitudes": lambda x: x * torch.exp2(torch.randint_like(x, -12, 12)),
    **{f"outlier 2**{p} in each group": with_outlier(p) for p in (1, 3, 5, 8, 12, 16)},
}
ROWS = (1, 3, 8, 40, 300)  # b1, b1, hmma, wgmma of 32 and of 256 rows on an H100


def blind_weights(n: int, k: int, group_size: int, dtype: torch.dtype):
    """Levels 0 and scale; bit 0 at the first of every 128 columns: no output sees an outlier."""
    packed, scales, _ = make_weights(n, k, group_size=group_size, dtype=dtype, device="cuda")
    packed[:, ::4] &= ~1
    return packed, scales, torch.zeros_like(scales)


def exact_product(x, packed, scales, biases, group_size):
    levels = (scales.cpu().double(), None if biases is None else biases.cpu().double())
    w = ops.dequantize(packed.cpu(), *levels, group_size).to(x.device)
    return x.double() @ w.mT


def assert_rule(x, packed, scales, biases, group_size):
    exact = exact_product(x, packed, scales, biases, group_size)
    w = ops.dequantize(packed, scales, biases, group_size).to(x.dtype)
    error = lambda y: float((y.double() - exact).norm() / exact.norm())
    ours, plain = ops.qmm(x, packed, scales, biases, group_size), F.linear(x, w)
    assert torch.isfinite(ours).all()
    assert error(ours) <= max(2 * error(plain), torch.finfo(x.dtype).eps / 2)


# Groups of 64 and 32 differ where x is bit planes, and where there are tiles.
ROWS_OF_GROUPS = {128: ROWS, 64: (1, 4, 40), 32: (2, 3, 40)}


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weights", ["seeing", "blind"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_structured_x_is_multiplied_as_accurately_as_torch_does(name, dtype, weights, group_size):
    for m in ROWS_OF_GROUPS[group_size]:
        x = STRUCTURED[name](torch.randn(m, 1024, device="cuda"))
        if dtype == torch.float16:
            x = x.clamp(-(2**12), 2**12)  # so that sums of eight outliers fit
        x = x.to(dtype)
        if weights == "seeing":
            args = make_weights(264, 1024, group_size=group_size, dtype=dtype, device="cuda")
        else:
            args = blind_weights(264, 1024, group_size, dtype)
        assert_rule(x, *args, group_size)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 16, 20, 64, 129, 500, 1500])
def test_every_way_of_multiplying_is_as_accurate_as_torch(m, dtype, group_size):
    for n, k, level in ((70, 512, torch.float16), (300, 1280, dtype), (1000, 3072, torch.float32)):
        packed, scales, biases = make_weights(
            n, k, group_size=group_size, dtype=level, symmetric=n == 300, device="cuda"
        )
        assert_rule(torch.randn(m, k, device="cuda").to(dtype), packed, scales, biases, group_size)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", ROWS)
def test_infinity_and_nan_spoil_their_row_alone(m, dtype):
    weights = make_weights(65, 512, dtype=torch.float16, device="cuda")
    x = torch.zeros(m + 2, 512, dtype=dtype, device="cuda")
    x[0, 5], x[1, 7] = float("inf"), float("nan")
    y = ops.qmm(x, *weights, 128)
    assert not torch.isfinite(y[:2]).any()
    assert torch.equal(y[2:], torch.zeros_like(y[2:]))


def test_an_index_out_of_range_gives_nan_in_its_row():
    weights = make_weights(6, 128, group_size=64, device="cuda")
    rows = ops.embedding(torch.tensor([5, 6, -1, 2**40, 0], device="cuda"), *weights, 64)
    assert torch.isnan(rows[1:4]).all() and torch.isfinite(rows[[0, 4]]).all()
    experts = make_weights(3, 64, 128, group_size=64, device="cuda")
    for transpose, columns in ((True, 128), (False, 64)):
        x, rhs = torch.randn(3, 1, columns, device="cuda"), torch.tensor([0, 3, 2], device="cuda")
        y = ops.gather_qmm(x, *experts, None, rhs, 64, transpose)
        assert torch.isnan(y[1]).all() and torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_rows_have_the_bits_of_the_cpu(group_size, dtype):
    w = torch.randn(301, 1280).to(dtype)
    w[0], w[1] = -w[0].abs(), 0.0
    cpu, gpu = ops.quantize(w, group_size), ops.quantize(w.cuda(), group_size)
    ids = torch.randint(0, 301, (77,))
    pairs = [*zip(cpu, gpu, strict=True)]
    pairs.append((ops.dequantize(*cpu, group_size), ops.dequantize(*gpu, group_size)))
    embedded = ops.embedding(ids.cuda(), *gpu, group_size)
    pairs.append((ops.embedding(ids, *cpu, group_size), embedded))
    for rule in torch_onebit.ops.RULES:
        pairs += zip(
            ops.quantize_levels(w, rule, group_size),
            ops.quantize_levels(w.cuda(), rule, group_size),
            strict=True,
        )
    for expected, actual in pairs:
        assert torch.equal(actual.cpu(), expected)


def test_flip_bits_decides_as_the_cpu():
    x, error = torch.randn(200, 256), torch.randn(33, 256)
    moments, scales, bits = x.T @ x / 200, torch.rand(33, 4), torch.rand(33, 256) > 0.5
    moved = [t.cuda() for t in (bits, error, scales, moments)]
    changes = ops.flip_bits_(bits, error, scales, moments, 64, 192, 64)
    assert torch.equal(ops.flip_bits_(*moved, 64, 192, 64).cpu(), changes)
    assert torch.equal(moved[0].cpu(), bits)


def test_float64_runs_as_plain_torch():
    packed, scales, biases = make_weights(8, 128, dtype=torch.float64, device="cuda")
    x = torch.randn(3, 128, dtype=torch.float64, device="cuda")
    expected = exact_product(x, packed, scales, biases, 128)
    torch.testing.assert_close(ops.qmm(x, packed, scales, biases, 128), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [*ROWS, 1500])
def test_a_graph_replays_what_ran_once(m, dtype):
    weights = make_weights(264, 1024, dtype=dtype, device="cuda")
    x = torch.randn(m, 1024, device="cuda").to(dtype)
    ops.qmm(x, *weights, 128)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.qmm(x, *weights, 128)
    for _ in range(3):
        x.copy_(torch.randn(m, 1024).to(dtype))
        graph.replay()
        assert torch.equal(y, ops.qmm(x, *weights, 128))


def test_kernels_run_on_the_current_stream():
    weights = make_weights(512, 4096, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    expected = ops.qmm(x + 1, *weights, 128)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # 10 ms: a kernel on another stream would read x before it
        y = ops.qmm(x.add_(1), *weights, 128)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_a_call_from_another_thread_finds_its_device():
    from concurrent.futures import ThreadPoolExecutor

    weights = make_weights(64, 512, device="cuda")
    x = torch.randn(2, 512, device="cuda")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ops.qmm(x, *weights, 128), range(8)))
    assert all(torch.equal(r, results[0]) for r in results)


def test_the_second_of_two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weights = make_weights(64, 512, device="cuda:1")
    x = torch.randn(2, 512, device="cuda:1")
    for m in (1, 2):
        assert_rule(x[:m], *weights, 128)


def test_a_training_step_equals_the_cpu():
    def step(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        layer = OneBitLinear.from_linear(torch.nn.Linear(256, 128), group_size=64).to(device)
        for level in (layer.scales, layer.biases):
            level.requires_grad_(True)
        x = torch.randn(40, 256).to(device).requires_grad_(True)
        layer(x).square().sum().backward()
        return [t.grad.cpu() for t in (x, layer.scales, layer.biases)]

    for cpu, gpu in zip(step("cpu"), step("cuda"), strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_layer_equals_the_eager_one(mode):
    layer = OneBitLinear(1024, 256, dtype=torch.bfloat16).cuda()
    layer.weight.random_(-(2**31), 2**31 - 1)
    layer.scales.data.uniform_(0.5, 1.5)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    with torch.no_grad():
        for m in (1, 8, 64):
            x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
            for _ in range(3):
                assert torch.equal(compiled(x), layer(x))


CACHE_RUN = """
import torch, torch_onebit
torch.manual_seed(0)
packed, scales, biases = torch.ops.onebit.quantize(torch.randn(64, 512, device="cuda"), 128)
y = torch.ops.onebit.qmm(torch.ones(1, 512, device="cuda"), packed, scales, biases, 128)
print(float(y.sum()))
"""


def run_with_cache(folder: Path | str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ONEBIT_CUDA_CACHE": str(folder)}
    run = subprocess.run([sys.executable, "-c", CACHE_RUN], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_compiled_kernels_are_kept_and_never_trusted(tmp_path):
    first = run_with_cache(tmp_path / "cache")
    stored = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    assert stored and all(p.suffix == ".cubin" for p in stored)
    assert run_with_cache(tmp_path / "cache") == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == stored
    for path in stored:  # torn by a crash
        path.write_bytes(path.read_bytes()[:100])
    assert run_with_cache(tmp_path / "cache") == first
    assert run_with_cache("/proc/no/such/folder") == first  # cannot be written: no error


def run_as(architecture: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ONEBIT_CUDA_ARCHITECTURE": architecture}
    command = [sys.executable, "-m", "torch_onebit", "selftest"]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("architecture", ["80", "120"])
def test_kernels_chosen_for_other_gpus_agree_with_the_cpu(architecture):
    run = run_as(architecture)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


def test_an_architecture_without_kernels_cannot_be_chosen():
    run = run_as("75")
    assert run.returncode != 0
    assert "ONEBIT_CUDA_ARCHITECTURE must be 80 or more" in run.stdout + run.stderr
