"""The encoder keeps Metal's and PyTorch's rules: each case in a process of its own."""

import os
import subprocess
import sys

import host_build
import pytest
import toolchain

ENCODER = toolchain.ROOT / "csrc/mps/encoder.mm"
PLAN = toolchain.ROOT / "csrc/mps/launch_plan.h"

PRODUCTS = """
import sys, torch
sys.path[:0] = [{metal!r}, {tests!r}, {root!r}]
import host_build
host_build.load({encoder})
import torch_onebit
from pathlib import Path
from helpers import assert_qmm, make_weights
w = make_weights(70, 2048, group_size=64, symmetric=True, device="mps")
for m in (1, 3, 37):  # the last in two launches
    assert_qmm(torch.randn(m, 2048).to("mps"), *w, 64)
"""


def run(code=PRODUCTS, encoder=None, **environment):
    here = toolchain.HERE
    code = code.format(
        metal=str(here),
        tests=str(here.parent),
        root=str(toolchain.ROOT),
        encoder=f"__import__('pathlib').Path({str(encoder)!r})" if encoder else "",
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "ONEBIT_FAKE_GPU": host_build.M3_MAX, **environment},
    )


CONTENTS = {"ONEBIT_FAKE_STORAGE_HOLDS_CONTENTS": "1"}
CONCURRENT = {"ONEBIT_FAKE_CONCURRENT": "1"}


@pytest.mark.parametrize("mode", [{}, CONTENTS, CONCURRENT, {**CONTENTS, **CONCURRENT}])
def test_products_are_right_whatever_storages_hold_and_encoders_order(mode):
    done = run(**mode)
    assert done.returncode == 0, done.stderr


MUTANTS = {  # before, after, what the fake Metal must say; None: the process dies, as on a Mac
    "an absent argument is not bound": (
        "work.buffers[i].defined() ? work.buffers[i] : work.buffers[0];",
        "work.buffers[i];\n    if (!t.defined()) continue;",
        "missing buffer binding at index 3",
    ),
    "the storage is taken for the buffer": (
        "kernel.arguments.setArg(static_cast<unsigned>(i), t);",
        "[at::mps::getCurrentMPSStream()->commandEncoder() setBuffer:(__bridge id<MTLBuffer>)"
        "t.storage().data() offset:t.storage_offset() * t.element_size() atIndex:i];",
        None,
    ),
    "no barrier before a launch": (
        "[encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];\n        (*ready)",
        "(*ready)",
        "dependent dispatches need a memory barrier",
    ),
    "no barrier after the last launch": (
        "[encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];\n      launches",
        "launches",
        "a memory barrier must follow the last dispatch",
    ),
    "a commit that waits": (
        "SyncType::COMMIT)",
        "SyncType::COMMIT_AND_WAIT)",
        "a commit must not wait",
    ),
    "tensor operations in an older language": (
        "metal4 ? kMetal4 : MTLLanguageVersion3_1",
        "MTLLanguageVersion3_1",
        "tensors need 4.0",
    ),
    "a newer language for all": (
        "metal4 ? kMetal4 : MTLLanguageVersion3_1",
        "kMetal4",
        "bfloat needs 3.1",
    ),
    "fast functions": (
        "MTLMathFloatingPointFunctionsPrecise",
        "MTLMathFloatingPointFunctionsFast",
        "needs precise functions",
    ),
}


@pytest.mark.parametrize("defect", MUTANTS)
def test_a_defect_in_the_encoder_is_reported(defect, tmp_path):
    before, after, message = MUTANTS[defect]
    text = ENCODER.read_text()
    assert text.count(before) == 1
    mutant = tmp_path / "encoder.mm"
    mutant.write_text(text.replace(before, after))
    many = PRODUCTS + "for _ in range(40): torch.ops.onebit.dequantize(*w, 64)\n"
    many += "import os; os.environ['ONEBIT_FAKE_GPU'] = '10:10'\n"
    many += "torch.ops.onebit.qmm(torch.ones(37, 2048).half().to('mps'), *w, 64)\n"
    done = run(many, mutant, ONEBIT_FAKE_STORAGE_HOLDS_CONTENTS="1")
    if message is None:
        assert done.returncode < 0
    else:
        # What only tensor operations suffer from, they are replaced for.
        noticed = done.returncode == 1 or "tensor operations are not used" in done.stderr
        assert noticed and message in done.stderr, done.stderr


# In a concurrent encoder: what is not ordered by a barrier runs late, and in another order.
UNORDERED = {
    "no barrier between a product and its sum": (
        "[encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];\n        (*ready)",
        "if (i == 0) [encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];\n        (*ready)",
    ),
    "no barrier after the last launch": MUTANTS["no barrier after the last launch"][:2],
}


@pytest.mark.parametrize("defect", UNORDERED)
def test_a_missing_barrier_gives_wrong_products_in_a_concurrent_encoder(defect, tmp_path):
    before, after = UNORDERED[defect]
    text = ENCODER.read_text()
    assert text.count(before) == 1
    mutant = tmp_path / "encoder.mm"
    mutant.write_text(text.replace(before, after))
    failed = [run(encoder=mutant, ONEBIT_FAKE_CONCURRENT=seed).returncode for seed in "13"]
    assert any(failed)


def test_a_failing_compiler_is_quoted():
    steps = {
        "compile": "metal/qmv_wide.metal of torch_onebit does not compile on Apple M1, macOS",
        "function": "the Metal kernel qmv_wide_float_3 is missing on Apple M1",
        "pipeline": "the Metal kernel qmv_wide_float_3 has no pipeline on Apple M1",
    }
    code = PRODUCTS.split("for m in")[0] + "x = torch.ones(3, 2048, device='mps')\n"
    for step in steps:  # in this order: what worked once is not asked again
        code += f"torch.ops.onebit_fake.fail_next({step!r})\n"
        code += "try: torch.ops.onebit.qmm(x, *w, 64)\nexcept RuntimeError as e: print(e)\n"
    done = run(code)
    for message in steps.values():
        assert message in done.stdout, done.stderr
    assert done.stdout.count("error: made to fail") == 3


def test_a_kernel_compiles_its_own_library_once():
    code = (
        PRODUCTS.split("for m in")[0]
        + """
compiled = torch.ops.onebit_fake.take_compiled
for m in (1, 1, 3, 4):
    torch.ops.onebit.qmm(torch.ones(m, 2048, device="mps"), *w, 64)
    print(compiled().replace(chr(10), " ").strip() or "-")
"""
    )
    done = run(code)
    starts = ["// y[n] = x . dequantize", "-", "// y[m, n] = x[m, :] . d", "-"]
    assert done.stdout.splitlines() == starts, done.stderr


def test_a_commit_follows_every_32_launches():
    code = (
        PRODUCTS.split("for m in")[0]
        + """
torch.ops.onebit_fake.take_log()
for _ in range(70): torch.ops.onebit.dequantize(*w, 64)
print([i for i, s in enumerate(torch.ops.onebit_fake.take_log().splitlines()) if s == "commit"])
"""
    )
    done = run(code)
    assert done.stdout.strip() == "[32, 65]", done.stderr
    assert "kCommitLaunches = 32" in PLAN.read_text()
