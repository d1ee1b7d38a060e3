"""The options that several commands have, and what is made of them."""

import argparse
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST_SEED = 2**32 - 1


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """What reads an integer from `low` to `high`, as the type of an option."""

    def read(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            end = "or more" if high is None else f"to {high}"
            raise argparse.ArgumentTypeError(f"{value} is not {low} {end}")
        return value

    read.__name__ = "integer"  # argparse's message has it
    return read


_SHARED: Mapping[str, Mapping[str, Any]] = {
    "--model": {
        "metavar": "NAME",
        "help": "efficientnet-lite0 or any classifier of torchvision",
    },
    "--weights": {
        "metavar": "FILE",
        "help": "a file with the model's state dict; nothing is downloaded",
    },
    "--method": {
        "nargs": "+",
        "action": "extend",
        "metavar": "NAME",
        "help": "see `captum-ext methods` (default: all of a layer)",
    },
    "--layer": {"metavar": "NAME", "help": "a dotted name (default: the last with a map)"},
    "--device": {"metavar": "D", "help": "cpu, cuda, cuda:1, mps (default: a GPU if any)"},
    "--devices": {
        "default": 1,
        "type": integer(1),
        "metavar": "N",
        "help": "GPUs to run on, or processes of a CPU (default: 1)",
    },
}


def add_options(
    parser: argparse.ArgumentParser, *flags: str, **changes: Any
) -> list[argparse.Action]:
    """Add options that several commands have, each with these `changes`."""
    return [parser.add_argument(flag, **{**_SHARED[flag], **changes}) for flag in flags]


def find_device(name: str | None) -> "torch.device":
    """The device called `name`; None is the first GPU, or the CPU where there is none.

    Raises:
        InputError: a device that is unknown or cannot be used.
    """
    import torch

    from captum_ext._errors import InputError

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            device = torch.device(name)
            torch.zeros(1, device=device).item()
    except (
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:  # what torch says of it takes many lines
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        mps = ["mps"] if torch.backends.mps.is_available() else []
        raise InputError(
            f"the device {name!r} cannot be used here. Available: {', '.join(['cpu', *gpus, *mps])}"
        ) from error
    return device


def check_devices(count: int, device: "torch.device") -> None:
    """Refuse more devices than there are, or one by name where several are asked for.

    Raises:
        InputError: either.
    """
    import torch

    from captum_ext._errors import InputError

    if device.type == "cpu":
        return
    gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    if count > gpus:
        raise InputError(f"--devices {count} are more than the GPUs here, {gpus}")
    if device.index is not None:
        raise InputError(f"--devices {count} begin at the first GPU: leave out --device {device}")


def noise(size: int) -> "Tensor":
    """A picture (1, 3, size, size) on which a model and a method are tried."""
    import torch

    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
