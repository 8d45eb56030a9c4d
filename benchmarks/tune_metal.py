"""Rows for the table of csrc/mps/launch_plan.h, from files of ``selftest --report``.

    python benchmarks/tune_metal.py REPORT...

For each GPU: which kernel was fastest at how many rows of x, what the present rules lose, and the
rows that would lose nothing. Runs anywhere.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

# Of several dtypes the rules can only follow one: that of most models.
DTYPE = "float16"
ANY = 2**32 - 1


def times(report: dict) -> dict[bool, dict[int, dict[str, float]]]:
    """Microseconds by transpose, rows of x and kernel."""
    found = defaultdict(lambda: defaultdict(dict))
    for s in report["speeds"]:
        if s["dtype"] == DTYPE:
            found[s["transpose"]][s["m"]][s["kernel"]] = s["microseconds"]
    return found


def fastest_rows(by_m: dict[int, dict[str, float]]) -> list[tuple[int, str]]:
    """(greatest m, kernel) in ascending order; the last one is for any m."""
    rows = []
    for m in sorted(by_m):
        kernel = min(by_m[m], key=by_m[m].get)
        if rows and rows[-1][1] == kernel:
            rows[-1] = (m, kernel)
        else:
            rows.append((m, kernel))
    return [*rows[:-1], (ANY, rows[-1][1])]


def enum_name(kernel: str) -> str:
    return "k" + "".join(part.capitalize() for part in kernel.split("_"))


def table(report: dict) -> list[str]:
    """The rows, as launch_plan.h has them."""
    family, lines = report["gpu"]["family"], []
    for transpose, by_m in sorted(times(report).items(), reverse=True):
        for greatest, kernel in fastest_rows(by_m):
            limit = "kAnyM" if greatest == ANY else greatest
            lines.append(
                f"    {{{str(transpose).lower()}, {family}, {limit}, Kernel::{enum_name(kernel)}}},"
            )
    return lines


def losses(report: dict) -> list[str]:
    """Where a rule chooses a kernel that is not the fastest."""
    rules, lines = report["rules"], []
    rule_of = {(s["transpose"], s["m"]): s["rule"] for s in report["speeds"]}
    for transpose, by_m in times(report).items():
        for m, kernels in sorted(by_m.items()):
            chosen = rules[rule_of[transpose, m]]["kernel"]
            best = min(kernels, key=kernels.get)
            if chosen in kernels and kernels[chosen] > kernels[best]:
                lost = kernels[chosen] / kernels[best] - 1
                lines.append(f"{'x . w^T' if transpose else 'x . w'}, {m} rows: {chosen} takes "
                             f"{lost:.0%} longer than {best}")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path)
    for path in parser.parse_args().reports:
        report = json.loads(path.read_text())
        gpu = report["gpu"]
        print(f"{report['machine']}: family {gpu['family']}, {gpu['cores']} cores")
        failed = [c["kernel"] for c in report["checks"] if not c["passed"]]
        print(f"checks that failed: {', '.join(failed) or 'none'}")
        print("\n".join([*losses(report), *table(report)]))


if __name__ == "__main__":
    main()
