"""Fixtures that choose where a test runs: device and CPU instruction set."""

import pytest
import torch

import torch_onebit  # noqa: F401  (loads the operators)

DEVICES = ["cpu"] + (["mps"] if torch.backends.mps.is_available() else [])


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
