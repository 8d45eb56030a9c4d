"""python -m torch_onebit: its options, and the bench's verdict on the machine it ran on."""

import pytest
import torch

import torch_onebit
from torch_onebit.__main__ import main
from torch_onebit.bench import measure, report


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["torch_onebit", *arguments])
    main()


def test_version(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--version")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"torch_onebit {torch_onebit.__version__}\n"


@pytest.mark.parametrize("command", ["bench", "info", "selftest"])
def test_an_unknown_option_shows_the_usage_of_its_command(command, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, command, "--foo")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: python -m torch_onebit {command}")
    assert "unrecognized arguments: --foo" in error


def test_interleave_spins_between_all_samples():
    measure.SPIN.clear()
    measure.interleave({"one": lambda: None, "two": lambda: None}, rounds=3)
    assert len(measure.SPIN.seconds) == len(measure.SPIN.cpu_seconds) == 6
    assert measure.SPIN.slowdown >= 0.9  # threads cannot get much more CPU time than there was


@pytest.mark.parametrize(
    "seconds, cpu, words",  # cpu: seconds that each of the threads is booked
    [
        ([1.0, 1.02, 1.04], [1.0, 1.02, 1.04], "machine was quiet"),
        ([1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, 2.5], "machine was quiet"),  # booked late
        ([1.0, 2.0, 2.1], [1.0, 2.0, 2.1], "not to be trusted"),  # now and then undisturbed
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], "not to be trusted"),  # never: the threads waited
    ],
)
def test_a_busy_machine_is_said_to_be_one(seconds, cpu, words):
    threads = torch.get_num_threads()
    results = {"slowdown": measure.Spin(seconds, [threads * s for s in cpu]).slowdown}
    assert words in report.verdict(results)
