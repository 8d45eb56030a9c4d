"""``python -m torch_onebit selftest``: every Metal or CUDA kernel against the CPU, on this GPU.

The table it prints is one page to attach to a report; docs/mac.md says what its lines mean.
"""

import platform
import subprocess
from collections.abc import Iterator

import torch

import torch_onebit
from torch_onebit.selftest.cases import Row, checks
from torch_onebit.selftest.report import write_report
from torch_onebit.selftest.speed import speeds


def rows(device: str) -> Iterator[Row]:
    """Every check, one after the other."""
    torch.manual_seed(0)
    for check in checks(device):
        yield check.run()


def machine() -> str:
    """The chip and the system, as a report needs them."""
    chip = platform.processor()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        chip = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    elif torch.cuda.is_available():
        chip = torch.cuda.get_device_name()
    return f"{chip}, {platform.platform()}"


def run(report: str | None = None) -> None:
    """Print the table; exit with an error when a kernel fails or there is no GPU with kernels.

    Args:
        report: file to write, with what is needed to tune the kernels for this GPU.
    """
    is_there = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    device = next((name for name, found in is_there.items() if found), None)
    if device is None:
        raise SystemExit("selftest needs an Apple or NVIDIA GPU that torch can use, and found none")
    if report and device != "mps":
        raise SystemExit("--report must be used on an Apple GPU, got one of NVIDIA")
    print(f"torch_onebit {torch_onebit.__version__}, torch {torch.__version__}, {machine()}")
    print(f"{'kernel':<32} {'dtype':<9} {'error':>9} {'allowed':>9}")
    found = []
    for row in rows(device):
        print(row, flush=True)
        found.append(row)
    for speed in speeds(device):
        print(speed, flush=True)
    if report:
        write_report(report, machine(), found)
        print(f"wrote {report}")
    if failed := sum(not row.passed for row in found):
        raise SystemExit(f"{failed} of {len(found)} checks failed")
    print("all kernels agree with the CPU")
