"""Search for a product that breaks the accuracy rule on the emulated GPU.

    python tests/metal/search_accuracy.py --count 200 --seed 0

Draws as tests/fuzz_accuracy.py does, on one GPU after the other; it prints what breaks the rule,
and the worst of each kernel.
"""

import argparse
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import host_build
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import fuzz_accuracy
from structured import errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="products to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next has seed + 1")
    parser.add_argument("--dtype", help="of x; any without")
    args = parser.parse_args()
    host_build.load()
    worst, ran, breaks = {}, {}, 0
    for seed in range(args.seed, args.seed + args.count):
        case = fuzz_accuracy.draw(random.Random(seed))
        case = replace(case, m=min(case.m, 70), n=max(case.n, case.group))
        if args.dtype and str(case.dtype) != f"torch.{args.dtype}":
            continue
        os.environ["ONEBIT_FAKE_GPU"] = host_build.GPUS[seed % len(host_build.GPUS)]
        torch.manual_seed(seed)
        torch.ops.onebit_fake.take_log()
        error, plain, allowed = errors(case, device="mps")
        launched = [line.split()[0] for line in torch.ops.onebit_fake.take_log().splitlines()]
        kernel = [k for k in launched if not k.startswith(("sum_partials", "commit"))][-1]
        ran[kernel] = ran.get(kernel, 0) + 1
        worst[kernel] = max(worst.get(kernel, (0.0, 0)), (error / allowed, seed))
        if error > allowed:
            breaks += 1
            print(f"{error:.2e}, torch {plain:.2e}: seed {seed}, {kernel}: {case}", flush=True)
    print(f"{sum(ran.values())} products, {breaks} beyond the rule")
    for kernel, (ratio, seed) in sorted(worst.items()):
        print(f"{kernel:28} {ran[kernel]:4}, worst {ratio:.2f} of what is allowed: seed {seed}")
    return min(breaks, 1)


if __name__ == "__main__":
    sys.exit(main())
