"""Products on several threads, wherever the system runs them."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import make_weights

ops = torch.ops.onebit
SIZE = 2048  # two threads' worth of work


def test_results_do_not_depend_on_how_many_threads_there_are():
    before = torch.get_num_threads()
    weights, x = make_weights(SIZE, SIZE), torch.randn(3, SIZE)
    results = []
    try:
        for count in (1, 7, 2):  # more, and fewer again
            torch.set_num_threads(count)
            results.append(ops.qmm(x, *weights, 128))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results)


PROGRAM = f"""
import os, time, torch
import torch_onebit
torch.set_num_threads(2)
packed = torch.randint(-(2**31), 2**31, ({SIZE}, {SIZE} // 32), dtype=torch.int32)
levels = torch.rand({SIZE}, {SIZE} // 128)
x = torch.randn(1, {SIZE})
call = lambda: torch.ops.onebit.qmm(x, packed, levels, None, 128)
expected = call()

def median(count):
    samples = []
    for _ in range(count):
        begin = time.perf_counter()
        assert torch.equal(call(), expected)
        samples.append(time.perf_counter() - begin)
    return sorted(samples)[count // 2]

core = {{min(os.sched_getaffinity(0))}}
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), core)
two = median(40)
torch.set_num_threads(1)
print(two / median(40))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_threads_that_get_no_core_are_not_waited_for():
    """Two threads on one core: with each waiting for the other it takes a time slice a call."""
    # With OpenMP's own way to wait, whatever the tests run with.
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4
