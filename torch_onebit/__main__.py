"""``python -m torch_onebit``: ``info``, ``bench`` (how fast), ``selftest`` (does the GPU agree),
and the commands on files in cli/."""

import argparse
import platform

import torch

import torch_onebit
from torch_onebit import bench, cli, selftest


def info() -> None:
    """Print versions, devices and CPU kernel tables."""
    ops = torch.ops.onebit
    rows = {
        "torch_onebit": f"{torch_onebit.__version__} in {torch_onebit.__path__[0]}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "devices": ", ".join(_devices()),
        "threads": str(torch.get_num_threads()),
        "CPU kernels": f"{ops.cpu_isa()} (available: {', '.join(ops.cpu_isas())})",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _devices() -> list[str]:
    names = ["cpu"]
    if torch.backends.mps.is_available():
        names.append("mps")
    if torch.cuda.is_available():
        names.append("cuda")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m torch_onebit", description=torch_onebit.__doc__
    )
    parser.add_argument(
        "--version", action="version", version=f"torch_onebit {torch_onebit.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser("info", help="versions, devices and CPU kernels")
    info_parser.set_defaults(run=lambda _: info())
    bench_parser = commands.add_parser("bench", help="speed against torch, MLX and the machine")
    bench.add_arguments(bench_parser)
    bench_parser.set_defaults(run=bench.run)
    selftest_parser = commands.add_parser("selftest", help="every GPU kernel against the CPU")
    selftest_parser.add_argument(
        "--report", metavar="FILE", help="write what is needed to tune the kernels, as JSON"
    )
    selftest_parser.set_defaults(run=lambda arguments: selftest.run(arguments.report))
    cli.add_commands(commands)
    arguments, unknown = parser.parse_known_args()
    if unknown:  # argparse would print the usage that does not list the command's options
        commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.run(arguments)


if __name__ == "__main__":
    main()
