"""The shaders as CUDA compile, and what the emulator did can be read again: for replay on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
from nvidia import gpu_build, replay
from toolchain import ROOT

HERE = Path(__file__).parent / "nvidia"
FAST = "--Ofast-compile=max"  # a second instead of one minute


def test_every_kernel_compiles():
    text, names, constants = gpu_build.source()
    program = gpu_build.compile_for("compute_90", text, FAST)
    assert "error" not in program.log
    assert "kLevelType" in constants
    assert len(set(names.values())) == len(names) > 80


def test_a_wrong_shader_does_not_compile():
    text, _, _ = gpu_build.source()
    wrong = text.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", "no_barrier();", 1)
    assert wrong != text
    with pytest.raises(gpu_build.nvrtc.CompileError, match="no_barrier"):
        gpu_build.compile_for("compute_90", wrong, FAST)


RECORD = """
import sys
sys.path[:0] = {paths}
from pathlib import Path
import gpu_trace
import torch
import torch_onebit
def few():
    w = torch.randn(3, 64, device="mps")
    torch_onebit.ops.quantize(w, 32)
gpu_trace.record(Path({folder!r}), few)
"""


def test_what_was_recorded_is_what_happened(tmp_path):
    paths = [str(HERE), str(HERE.parent), str(ROOT)]
    script = RECORD.format(paths=paths, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (dispatch,) = replay.read_dispatches(tmp_path / "dispatches")
    assert dispatch.kernel == "quantize_float"
    changed = [b for b in dispatch.buffers if b.after != b.before]
    assert [len(b.after) for b in changed] == [3 * 2 * 4] * 3  # words, scales, biases
    assert not any(b.read_only for b in changed)
