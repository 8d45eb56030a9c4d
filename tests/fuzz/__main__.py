"""python -m fuzz KIND --seconds 60: see `--help`."""

import argparse
import importlib
import secrets
import sys

from fuzz import runner

KINDS = ("calls", "illegal", "modules")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz",
        description="calls: random legal calls against float64. illegal: random illegal calls, "
        "which must raise. modules: random sequences of module calls against a plain PyTorch twin. "
        "all: one after the other. Run it in tests/.",
    )
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("--seconds", type=float, help="how long, all in all")
    parser.add_argument("--count", type=int, help="how many cases, of each kind")
    parser.add_argument("--first", type=int, help="number of the first case; random without it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seconds is None and options.count is None:
        parser.error("seconds or count must be given")
    first = secrets.randbelow(2**40) if options.first is None else options.first
    if options.child:
        case = importlib.import_module(f"fuzz.{options.kind}").case
        return runner.child(
            options.kind, case, first, options.count, options.seconds, options.child
        )
    kinds = KINDS if options.kind == "all" else (options.kind,)
    seconds = None if options.seconds is None else options.seconds / len(kinds)
    return sum([runner.run(kind, first, options.count, seconds) for kind in kinds]) != 0


sys.exit(main())
