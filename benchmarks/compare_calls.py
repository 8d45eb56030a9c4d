"""What a call costs in two checkouts, both built in place, by turns in one run.

    python benchmarks/compare_calls.py BEFORE NOW

The products are so small that the call is what takes time. Each checkout answers from a process of
its own, on the same core; the ratio is of the 10th percentiles of the turns: what other processes
take does not count.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

SERVER = """
import json, sys, time
import torch, torch_onebit
torch.set_num_threads(1)
layer = torch_onebit.OneBitLinear(32, 1, group_size=32).requires_grad_(False)
x = torch.randn(1, 32)
qmm, arguments = torch.ops.onebit.qmm, (x, layer.weight, layer.scales, layer.biases)
wrapper, with_gradient = torch_onebit.qmm, x.clone().requires_grad_()
with torch.inference_mode():
    below = tuple(t.clone() for t in arguments)
calls = {
    "torch.ops.onebit.qmm": lambda: qmm(*arguments, 32),
    "the same below autograd": lambda: qmm(*below, 32),
    "torch_onebit.qmm": lambda: wrapper(*arguments, 32),
    "OneBitLinear": lambda: layer(x),
    "OneBitLinear, x with gradient": lambda: layer(with_gradient),
}
print(json.dumps(list(calls)), flush=True)
for line in sys.stdin:
    call, start = list(calls.values())[int(line)], time.perf_counter()
    for _ in range(2000): call()
    print((time.perf_counter() - start) / 2000 * 1e6, flush=True)
"""


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env={**os.environ, "PYTHONPATH": str(folder)},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.calls = json.loads(self.process.stdout.readline())

    def microseconds(self, call: int) -> float:
        self.process.stdin.write(f"{call}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs=2, type=lambda p: Path(p).resolve())
    parser.add_argument("--turns", type=int, default=60)
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    checkouts = [Checkout(folder) for folder in args.checkouts]
    print(f"{'microseconds a call':30}{'before':>8}{'now':>8}{'ratio':>8}")
    for i, name in enumerate(checkouts[0].calls):
        times = [[], []]
        for turn in range(args.turns + 2):
            order = list(zip(checkouts, times, strict=True))
            for checkout, mine in order if turn % 2 else order[::-1]:
                mine.append(checkout.microseconds(i))
        before, now = (sorted(t[2:])[len(t) // 10] for t in times)
        print(f"{name:30}{before:8.2f}{now:8.2f}{now / before:8.2f}", flush=True)


if __name__ == "__main__":
    main()
