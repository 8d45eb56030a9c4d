"""Cases that run in two processes, connected by gloo."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

PROCESSES = 2
TIMEOUT = timedelta(seconds=60)  # of a process that waits for one whose case has failed
Cases = dict[str, Callable[[], str | None]]


def outcomes(cases: Callable[[Path], Cases], folder: Path) -> list[dict[str, str]]:
    """What is wrong with each case, or "", in each process: what it returns or raises.

    Args:
        cases: makes the cases, in each process; of a module's own, for it goes there by name.
        folder: what the processes can share.
    """
    torch.multiprocessing.spawn(_work, (cases, folder), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def _work(rank: int, cases: Callable[[Path], Cases], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=TIMEOUT,
    )
    results = {}
    for name, case in cases(folder).items():
        torch.manual_seed(0)
        try:
            results[name] = case() or ""
        except (Exception, pytest.fail.Exception) as error:  # each row reports its own
            results[name] = f"{type(error).__name__}: {error}"
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
