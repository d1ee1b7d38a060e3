"""The command line: `explain`, `methods`, `train-fcam` and `evaluate`, a module each.

Modules that take long to import, such as torch, are imported only where they are used, so that
`--help` is quick.
"""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from captum_ext import __version__
from captum_ext.cli import evaluate, explain, methods, train_fcam
from captum_ext.cli.output import say


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        say("error", f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "captum-ext",
        description="Attribution maps of image classifiers: draw them, measure them, and train a "
        "decoder for them.",
    )
    parser.add_argument("--version", action="version", version=f"captum-ext {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (explain, methods, train_fcam, evaluate):
        command.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 where a part of an evaluation failed; 2 for errors that the user can
        correct; 130 for Ctrl-C.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        arguments = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], int | None] = arguments.run
        code = run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        say("stopped", str(stop) or "interrupted")
        return 130
    except BrokenPipeError:  # `captum-ext methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from captum_ext._errors import InputError

        if isinstance(error, ImportError) and isinstance(error.__context__, KeyboardInterrupt):
            say("stopped", "interrupted")  # while a module was being imported
            return 130
        if not isinstance(error, InputError | OSError):
            raise
        say("error", str(error))
        return 2
    return code or 0
