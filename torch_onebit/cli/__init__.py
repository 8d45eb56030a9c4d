"""The commands of ``python -m torch_onebit`` that work on files: a module each."""

import argparse
import sys
from collections.abc import Callable

from torch_onebit.cli import convert, generate, inspect

COMMANDS = {"convert": convert, "inspect": inspect, "generate": generate}


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    for name, module in COMMANDS.items():
        parser = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        parser.set_defaults(run=_without_traceback(module.run))


def _without_traceback(
    run: Callable[[argparse.Namespace], None],
) -> Callable[[argparse.Namespace], None]:
    """What a user can mend is one line on stderr and exit status 1; an interrupt is 130."""

    def guarded(arguments: argparse.Namespace) -> None:
        try:
            run(arguments)
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit(130)

    return guarded
