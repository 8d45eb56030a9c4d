"""Some hundreds of random calls and sequences of each kind: `make fuzz` makes as many as wanted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("kind, count", [("calls", 300), ("illegal", 400), ("modules", 60)])
def test_random_cases(kind, count):
    command = [sys.executable, "-m", "fuzz", kind, "--first", "0", "--count", str(count)]
    package = os.pathsep.join([str(TESTS.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": package}
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert f"{kind}: {count} cases" in run.stdout


@pytest.mark.parametrize(
    "end, code", [("os.abort()", -6), ("os._exit(1)", 1)], ids=["a crash", "a sanitizer's report"]
)
def test_a_case_that_ends_the_process_is_reported_with_its_number(end, code, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, sys\n"
        "from fuzz import runner\n"
        "if len(sys.argv) > 1 and sys.argv[1] == 'child':\n"
        f"    case = lambda n: {end} if n == 7 else 1\n"
        "    first, count, state = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]\n"
        "    sys.exit(runner.child('calls', case, first, count, None, state))\n"
        "run = lambda kind, first, count, seconds, path: [\n"
        "    sys.executable, __file__, 'child', str(first), str(count), path]\n"
        "runner.child_command = run\n"
        "sys.exit(runner.run('calls', 3, 10, None))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, str(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"case 7 ended the process with code {code}" in run.stdout
    assert "--first 7 --count 1" in run.stdout
