"""Run numbered cases in a child process, so that a crash is one more failure with a number."""

import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from mmap import mmap
from pathlib import Path

Case = Callable[[int], int]  # from its number to the calls it made; raises when one is wrong

TESTS = Path(__file__).parent.parent
MOST_FAILURES = 5  # shown before a run gives up
_STATE = struct.Struct("4q")  # next case, cases, calls, failures


def command(kind: str, case: int) -> str:
    return f"cd {TESTS.name} && python -m fuzz {kind} --first {case} --count 1"


def child_command(
    kind: str, first: int, count: int | None, seconds: float | None, path: str
) -> list[str]:
    options = {"--first": first, "--count": count, "--seconds": seconds, "--child": path}
    given = [str(word) for item in options.items() if item[1] is not None for word in item]
    return [sys.executable, "-m", "fuzz", kind, *given]


def run(kind: str, first: int, count: int | None, seconds: float | None) -> int:
    """Run cases from `first` on, for a number of cases or of seconds; the number of failures."""
    end = time.monotonic() + seconds if seconds is not None else float("inf")
    cases = calls = failures = 0
    while failures < MOST_FAILURES:
        left = None if count is None else count - cases
        if left == 0 or time.monotonic() >= end:
            break
        with tempfile.NamedTemporaryFile() as state:
            state.write(_STATE.pack(-1, 0, 0, 0))
            state.flush()
            rest = None if seconds is None else end - time.monotonic()
            command_line = child_command(kind, first, left, rest, state.name)
            code = subprocess.run(command_line, cwd=TESTS).returncode
            state.seek(0)
            next_case, done, made, failed = _STATE.unpack(state.read())
        if next_case < 0:
            print(f"{kind} did not start, code {code}")
            return 1
        cases, calls, failures = cases + done, calls + made, failures + failed
        if code != (failed != 0):  # a sanitizer, too, ends a process with code 1
            print(f"case {next_case} ended the process with code {code}", flush=True)
            print(f"reproduce: {command(kind, next_case)}", flush=True)
            failures += 1
            cases += 1
        first = next_case + 1
    print(f"{kind}: {cases:,} cases, {calls:,} calls, {failures} failures", flush=True)
    return failures


def child(
    kind: str, case: Case, first: int, count: int | None, seconds: float | None, path: str
) -> int:
    """What the child does: every case with its own seed; the file at path says how far it is."""
    end = time.monotonic() + seconds if seconds is not None else float("inf")
    cases = calls = failures = 0
    with open(path, "r+b") as file, mmap(file.fileno(), _STATE.size) as state:
        while failures < MOST_FAILURES and cases != count and time.monotonic() < end:
            number = first + cases
            state[:] = _STATE.pack(number, cases, calls, failures)
            try:
                calls += case(number)
            except Exception:
                failures += 1
                print(f"case {number}:\n{traceback.format_exc(limit=-3)}", flush=True)
                print(f"reproduce: {command(kind, number)}\n", flush=True)
            cases += 1
        state[:] = _STATE.pack(first + cases - 1, cases, calls, failures)
    return failures != 0
