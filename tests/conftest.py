"""Fixtures that choose where a test runs: device and CPU instruction set."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import torch_onebit  # noqa: F401  (loads the operators)

# The proof that stands in for a Mac or an NVIDIA GPU runs on Linux.
emulated = [f"cuda/test_{name}.py" for name in ("emulated", "emulated_defects", "fragments")]
collect_ignore = [] if sys.platform == "linux" else ["metal", "cuda/test_nvrtc.py", *emulated]

DEVICES = ["cpu"]
if sys.platform == "linux" and find_spec("ziglang"):
    # No Apple GPU here: the real csrc/mps and metal/ run on an emulated one. First of all, for
    # torch remembers whether there is one the first time it is asked.
    sys.path.insert(0, str(Path(__file__).parent / "metal"))
    import host_build

    host_build.load()
    DEVICES.append("mps")
elif torch.backends.mps.is_available():
    DEVICES.append("mps")
if torch.cuda.is_available():
    DEVICES.append("cuda")
else:
    collect_ignore += ["cuda/test_cuda.py", "cuda/test_cuda_models.py"]


def pytest_collection_modifyitems(config, items):
    """A GPU gains nothing from one run per CPU instruction set, and mps has no float64."""
    last_isa = torch.ops.onebit.cpu_isas()[-1]

    def runs(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        device = params.get("device", "cpu")
        if device == "cpu":
            return True
        values = [v for p in params.values() for v in (p if isinstance(p, tuple) else (p,))]
        exists = device != "mps" or torch.float64 not in values
        return exists and params.get("isa", last_isa) == last_isa

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[pytest.param(d, marks=[getattr(pytest.mark, d)]) for d in DEVICES])
def device(request):
    return request.param


@pytest.fixture(params=torch.ops.onebit.cpu_isas())
def isa(request):
    """Run with one of the CPU kernel tables this machine has."""
    before = torch.ops.onebit.cpu_isa()
    torch.ops.onebit.set_cpu_isa(request.param)
    yield request.param
    torch.ops.onebit.set_cpu_isa(before)
