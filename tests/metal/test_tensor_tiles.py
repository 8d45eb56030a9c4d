"""Tensor operations are used after they agreed with simdgroup matrices, and not otherwise."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import emulator
import pytest
import test_selftest
import toolchain
from host_build import M3_MAX, M5

HERE = toolchain.HERE

# Each case in a process of its own: what was found holds for the process. They are forks of one
# that has loaded the library.
CASES = """
import json, os, sys, tempfile
sys.path[:0] = [{metal!r}, {tests!r}, {root!r}]
import host_build
host_build.load()
import torch, torch_onebit
fake = torch.ops.onebit_fake

def product(kernel, x, words, *levels):
    if kernel == "qmm_n_tensor":
        return torch.ops.onebit.qmm(x[:, :70].contiguous(), words, *levels, 64, False)
    if kernel == "qmm_tensor":
        return torch.ops.onebit.qmm(x, words, *levels, 64)
    w = [t if t is None else t.view(2, 35, -1) for t in (words, *levels)]
    index = torch.arange(37, device=x.device) // 20
    return torch.ops.onebit.gather_qmm(x.view(37, 1, 256), *w, None, index, 64, True, True)

def case(kernel, gpu, emulator, failing, has_biases):
    os.environ["ONEBIT_FAKE_GPU"] = gpu
    if emulator: os.environ["ONEBIT_EMULATOR"] = emulator
    if failing: fake.fail_next(failing)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    x = torch.arange(37 * 256).remainder(7).sub(3).half().view(37, 256)
    words = torch.arange(70 * 8).mul(2654435761).remainder(2**31).int().view(70, 8)
    levels = torch.ones(70, 4).half()
    w = (words, levels * 2, -levels if has_biases else None)
    expected = product(kernel, x, *w)
    moved = [t if t is None else t.to("mps") for t in (x, *w)]
    runs, said = [], tempfile.TemporaryFile()
    os.dup2(said.fileno(), 2)  # where C++ warns
    for _ in range(3):
        fake.take_log(), fake.take_compiled()
        y = product(kernel, *moved).cpu()
        kernels = [line.split()[0] for line in fake.take_log().splitlines() if " " in line]
        runs.append([torch.equal(y, expected), kernels, fake.take_compiled().count("// ")])
    said.seek(0)
    return dict(runs=runs, said=[s for s in said.read().decode().splitlines() if s],
                draws=bool((torch.get_rng_state() != state).any()))

for line in sys.stdin:
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, json.dumps(case(*json.loads(line))).encode())
        os._exit(0)
    os.close(write)
    print(os.fdopen(read).read(), flush=True)
    os.wait()
"""


def run(cases: list[tuple]) -> list[dict]:
    names = {"metal": str(HERE), "tests": str(HERE.parent), "root": str(toolchain.ROOT)}
    code = CASES
    for name, value in names.items():
        code = code.replace(f"{{{name}!r}}", repr(value))
    lines = "\n".join(json.dumps(case) for case in cases)
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=lines,
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    results = done.stdout.splitlines()
    assert len(results) == len(cases) and all(results), done.stderr[-3000:]
    return [json.loads(r) for r in results]


# Of each kernel: the instance that the cases need, and that which takes its place.
TENSOR = {
    "qmm_tensor": ("qmm_tensor_half_64", "qmm_half_64"),
    "qmm_n_tensor": ("qmm_n_tensor_half_64", "qmm_n_half"),
    "qmm_sorted_tensor": ("qmm_sorted_tensor_half_32", "qmm_sorted_half_32"),
}
# As the shaders write them.
INSTANCES = {
    "qmm_tensor_half_64": "qmm_tensor<half, half, 64>",
    "qmm_half_64": "qmm<half, half, half, 4>",
    "qmm_n_tensor_half_64": "qmm_n_tensor<half, half, 64>",
    "qmm_n_half": "qmm_n<half, half>",
    "qmm_sorted_tensor_half_32": "qmm_sorted_tensor<half>",
    "qmm_sorted_half_32": "qmm_sorted<half, half>",
}
# A kernel that is wrong: the selftest finds these too. Of another group size, of splits and batches
# there may be none in the tiles that are tried.
MUTANTS = [
    defect
    for defect in test_selftest.MUTANTS
    if "_tensor:" in defect and not any(w in defect for w in ("split", "batch", "group of"))
]


def broken(folder, defect):
    """The shaders that are compared, with the defect, and their instances that are compared."""
    file, before, after, *_ = test_selftest.MUTANTS[defect]
    shaders = emulator.broken_shaders(folder, file, before, after)
    kernel = defect.split(":")[0]
    older = "qmm_n" if kernel == "qmm_n_tensor" else "qmm"
    paths = [shaders / f"{stem}.metal" for stem in (kernel, older)]
    for path, name in zip(paths, TENSOR[kernel], strict=True):
        head = re.split(r"^ONEBIT_INSTANTIATE", path.read_text(), flags=re.MULTILINE)[0]
        path.write_text(f'{head}ONEBIT_INSTANTIATE("{name}", {INSTANCES[name]})\n')
    return str(emulator.build(paths))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What happens in each case, by its name."""
    folders = {defect: tmp_path_factory.mktemp("mutant") for defect in MUTANTS}
    with ThreadPoolExecutor(2) as pool:
        libraries = dict(zip(folders, pool.map(broken, folders.values(), folders), strict=True))
    cases = {}
    for kernel in TENSOR:
        cases[f"{kernel}: right"] = (kernel, M5, "", "", True)
        cases[f"{kernel}: right, no biases"] = (kernel, M5, "", "", False)
        cases[f"{kernel}: older"] = (kernel, M3_MAX, "", "", True)
        cases[f"{kernel}: does not compile"] = (kernel, M5, "", "compile 4.0", True)
    for defect, library in libraries.items():
        cases[defect] = (defect.split(":")[0], M5, library, "", True)
    return dict(zip(cases, run(list(cases.values())), strict=True))


@pytest.mark.parametrize("case", ["right", "right, no biases"])
@pytest.mark.parametrize("kernel", TENSOR)
def test_what_agrees_is_used_and_tried_once(kernel, case, results):
    found = results[f"{kernel}: {case}"]
    tensor, older = TENSOR[kernel]
    assert [k for _, k, _ in found["runs"]] == [[older, tensor, tensor], [tensor], [tensor]]
    assert all(equal for equal, *_ in found["runs"]) and found["said"] == []


@pytest.mark.parametrize("kernel", TENSOR)
def test_an_older_gpu_compiles_nothing_of_metal_4(kernel, results):
    _, older = TENSOR[kernel]
    (_, kernels, compiled), *later = results[f"{kernel}: older"]["runs"]
    assert (kernels, compiled) == ([older], 1)
    assert all(run == [True, [older], 0] for run in later)


@pytest.mark.parametrize("case", [*(f"{kernel}: does not compile" for kernel in TENSOR), *MUTANTS])
def test_what_does_not_agree_is_announced_once_and_never_used(case, results):
    found = results[case]
    kernel, what = case.split(": ")
    _, older = TENSOR[kernel]
    assert all(equal for equal, *_ in found["runs"])
    first, *later = [kernels for _, kernels, _ in found["runs"]]
    assert first[-1] == older and later == [[older]] * 2
    assert [compiled for *_, compiled in found["runs"][1:]] == [0, 0]
    (warning,) = found["said"]
    assert "tensor operations are not used on this machine: " in warning
    assert "Simdgroup matrices take their place." in warning
    if what == "does not compile":
        assert f"metal/{kernel}.metal of torch_onebit does not compile on Apple M1" in warning


def test_nobody_draws_from_torchs_generator(results):
    assert not any(found["draws"] for found in results.values())
