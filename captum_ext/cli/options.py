"""The options of the commands: tables of `argparse` settings, and those that commands share."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

# Settings of `add_argument` by flag or, for an argument without a flag, by its name.
Options = Mapping[str, Mapping[str, Any]]

LARGEST_SEED = 2**32 - 1


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A function that reads an integer from `low` to `high`, the `type` of an option."""

    def read(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            end = "or more" if high is None else f"to {high}"
            raise argparse.ArgumentTypeError(f"{value} is not {low} {end}")
        return value

    read.__name__ = "integer"  # argparse's message has it
    return read


COUNT: dict[str, Any] = {"metavar": "N", "type": integer(1)}

SHARED: Mapping[str, dict[str, Any]] = {
    "--model": {
        "metavar": "NAME",
        "help": "the classifier: efficientnet-lite0 or any classifier of torchvision",
    },
    "--weights": {
        "metavar": "FILE",
        "help": "a file with the model's state dict, to use instead of the published weights",
    },
    "--method": {
        "nargs": "+",
        "action": "extend",
        "metavar": "NAME",
        "help": "the methods, by their names in `captum-ext methods` (default: all of this package "
        "that explain a layer)",
    },
    "--layer": {
        "metavar": "NAME",
        "help": "the layer to explain, by its dotted name in the model (default: the last layer "
        "that has a map)",
    },
    "--device": {
        "metavar": "D",
        "help": "the device to run on: cpu, cuda, cuda:1, mps (default: a GPU if there is one)",
    },
    "--devices": COUNT | {"help": "the number of GPUs, or of processes on a CPU"},
    "--seed": {
        "metavar": "N",
        "type": integer(0, LARGEST_SEED),
        "help": "the seed of all random numbers",
    },
    "--workers": {
        "metavar": "N",
        "type": integer(0),
        "help": "the number of processes that read pictures",
    },
}


def add_options(
    parser: argparse.ArgumentParser, options: Options
) -> tuple[list[argparse.Action], dict[str, Any]]:
    """Add options to a parser, so that its namespace has only those that the user gives.

    A `default` in the table is shown in the option's help.

    Returns:
        The options as argparse has them, and their defaults by their names in a namespace.
    """
    actions, defaults = [], {}
    for name, settings in options.items():
        default = settings.get("default")
        suffix = "" if default is None or default is False else f" (default: {default})"
        settings = {**settings, "default": argparse.SUPPRESS, "help": settings["help"] + suffix}
        action = parser.add_argument(name, **settings)
        actions.append(action)
        defaults[action.dest] = default
    return actions, defaults
