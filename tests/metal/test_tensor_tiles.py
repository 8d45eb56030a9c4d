"""Tensor operations are used after they agreed with simdgroup matrices, and not otherwise."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import emulator
import pytest
import test_selftest
import toolchain
from test_mps import M3_MAX, M5

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

def case(gpu, emulator, failing, has_biases):
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
    expected = torch.ops.onebit.qmm(x, *w, 64)
    moved = [t if t is None else t.to("mps") for t in (x, *w)]
    runs, said = [], tempfile.TemporaryFile()
    os.dup2(said.fileno(), 2)  # where C++ warns
    for _ in range(3):
        fake.take_log(), fake.take_compiled()
        y = torch.ops.onebit.qmm(*moved, 64).cpu()
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


# what fails, the GPU; the warning
TRIED, USED = ["qmm_half_64", "qmm_tensor_half_64"], ["qmm_tensor_half_64"]
FALLBACKS = {
    "compile 4.0": "metal/qmm_tensor.metal of torch_onebit does not compile on Apple M1",
}
# A kernel that is wrong: the selftest finds these too.
MUTANTS = [
    defect
    for defect, (file, *_) in test_selftest.MUTANTS.items()
    if file == "qmm_tensor.metal" and "split" not in defect and "batch" not in defect
]


def broken(folder, defect):
    """The shaders that are compared, with the defect, and their instances that are compared."""
    file, before, after, *_ = test_selftest.MUTANTS[defect]
    shaders = emulator.broken_shaders(folder, file, before, after)
    tensor, simdgroup = shaders / "qmm_tensor.metal", shaders / "qmm.metal"
    head, _ = tensor.read_text().split("#define ONEBIT_INSTANTIATE_ROWS")
    tensor.write_text(
        head + 'ONEBIT_INSTANTIATE("qmm_tensor_half_64", qmm_tensor<half, half, 64>)\n'
    )
    head, _ = simdgroup.read_text().split('ONEBIT_INSTANTIATE("qmm_float"')
    simdgroup.write_text(head + 'ONEBIT_INSTANTIATE("qmm_half_64", qmm<half, half, half, 4>)\n')
    return str(emulator.build([tensor, simdgroup]))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What happens in each case, by its name."""
    folders = {defect: tmp_path_factory.mktemp("mutant") for defect in MUTANTS}
    with ThreadPoolExecutor(2) as pool:
        libraries = dict(zip(folders, pool.map(broken, folders.values(), folders), strict=True))
    cases = {
        "right": (M5, "", "", True),
        "right, no biases": (M5, "", "", False),
        "older": (M3_MAX, "", "", True),
        **{step: (M5, "", step, True) for step in FALLBACKS},
        **{defect: (M5, library, "", True) for defect, library in libraries.items()},
    }
    return dict(zip(cases, run(list(cases.values())), strict=True))


@pytest.mark.parametrize("case", ["right", "right, no biases"])
def test_what_agrees_is_used_and_tried_once(case, results):
    found = results[case]
    assert [kernels for _, kernels, _ in found["runs"]] == [TRIED + USED, USED, USED]
    assert all(equal for equal, *_ in found["runs"]) and found["said"] == []


def test_an_older_gpu_compiles_nothing_of_metal_4(results):
    (_, kernels, compiled), *later = results["older"]["runs"]
    assert (kernels, compiled) == (["qmm_half_64"], 1)
    assert all(run == [True, ["qmm_half_64"], 0] for run in later)


@pytest.mark.parametrize("case", [*FALLBACKS, *MUTANTS])
def test_what_does_not_agree_is_announced_once_and_never_used(case, results):
    found = results[case]
    assert all(equal for equal, *_ in found["runs"])
    first, *later = [kernels for _, kernels, _ in found["runs"]]
    assert first[-1] == "qmm_half_64" and later == [["qmm_half_64"]] * 2
    assert [compiled for *_, compiled in found["runs"][1:]] == [0, 0]
    (warning,) = found["said"]
    assert "tensor operations are not used on this machine: " in warning
    assert "Simdgroup matrices take their place." in warning
    assert FALLBACKS.get(case, "") in warning


def test_nobody_draws_from_torchs_generator(results):
    assert not any(found["draws"] for found in results.values())
