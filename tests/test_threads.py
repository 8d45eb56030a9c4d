"""Products on several threads, whoever calls them and wherever the system runs them."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import make_weights

ops = torch.ops.onebit
SIZE = 2048  # two threads' worth of work

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="affinity and fork are Linux's")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_do_not_depend_on_how_many_threads_there_are(threads):
    weights, x = make_weights(SIZE, SIZE), torch.randn(3, SIZE)
    results = []
    for count in (1, 7, 2):  # more, and fewer again
        threads(count)
        results.append(ops.qmm(x, *weights, 128))
    assert all(torch.equal(results[0], y) for y in results)


def test_python_threads_call_at_once(threads):
    threads(2)
    weights = make_weights(SIZE, SIZE)
    xs = [torch.randn(1 + i, SIZE) for i in range(6)]
    expected = [ops.qmm(x, *weights, 128) for x in xs]
    with ThreadPoolExecutor(len(xs)) as pool:
        for _ in range(5):
            results = list(pool.map(lambda x: ops.qmm(x, *weights, 128), xs))
            assert all(map(torch.equal, results, expected))


PROGRAM = """
import os, time, torch
import torch_onebit
torch.set_num_threads(2)
packed = torch.randint(-(2**31), 2**31, ({size}, {size} // 32), dtype=torch.int32)
levels = torch.randn({size}, {size} // 128)
x = torch.randn(1, {size})
call = lambda: torch.ops.onebit.qmm(x, packed, levels, None, 128)
expected = call()

def median(count):
    samples = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return sorted(samples)[count // 2]
"""


def run(program: str) -> str:
    command = [sys.executable, "-c", PROGRAM.format(size=SIZE) + program]
    # With OpenMP's own way to wait, whatever the tests run with.
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr  # workers are awake or asleep when it ends
    return done.stdout


def test_a_forked_child_has_threads_of_its_own():
    run("""
child = os.fork()
if child == 0:
    same = torch.equal(call(), expected)
    os._exit(0 if same and len(os.listdir("/proc/self/task")) > 1 else 1)
assert os.waitpid(child, 0)[1] == 0 and torch.equal(call(), expected)
""")


def test_threads_that_get_no_core_are_not_waited_for():
    """Two threads on one core: with each waiting for the other it takes a time slice a call."""
    ratio = run("""
core = {min(os.sched_getaffinity(0))}
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), core)
two = median(40)
torch.set_num_threads(1)
print(two / median(40))
""")
    assert float(ratio) < 4
