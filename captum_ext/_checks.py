"""Checks of arguments before any model call, with errors that name the argument; and warnings."""

import difflib
import math
import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Generator, Tensor

from captum_ext._errors import ArgumentError, ArgumentTypeError

_LONGEST_NAME = 100  # characters that are compared with names


def is_finite(value: Any) -> bool:
    """Return whether `value` is an int or a float, and neither infinite nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def check_count(name: str, value: int) -> None:
    """Raise a ValueError unless argument `name` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"`{name}` must be an integer of at least 1, got {value!r}.", name)


def check_seed(value: Any) -> None:
    """Raise a TypeError unless the argument `seed` is an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"`seed` must be an integer, got {value!r}.", "seed")


def check_range(name: str, value: Any, low: float, high: float, *, below: bool = False) -> None:
    """Raise a ValueError unless argument `name` is a number from `low` to `high`.

    Args:
        name: the argument's name.
        value: its value.
        low: the smallest allowed value.
        high: the largest allowed value.
        below: do not allow `high` itself.
    """
    if not is_finite(value) or not low <= value <= high or (below and value == high):
        end = "below" if below else "at most"
        raise ArgumentError(
            f"`{name}` must be a number, at least {low:g} and {end} {high:g}, got {value!r}.", name
        )


def check_positive(name: str, value: Any) -> None:
    """Raise a ValueError unless argument `name` is a number greater than 0."""
    if isinstance(value, bool) or not is_finite(value) or value <= 0:
        raise ArgumentError(f"`{name}` must be a number, greater than 0, got {value!r}.", name)


def check_non_negative(name: str, value: Any) -> None:
    """Raise a ValueError unless argument `name` is a number of 0 or more."""
    if isinstance(value, bool) or not is_finite(value) or value < 0:
        raise ArgumentError(f"`{name}` must be a number, 0 or more, got {value!r}.", name)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise a ValueError unless argument `name` is one of the choices."""
    if not isinstance(value, str | None) or value not in tuple(choices):
        raise ArgumentError(f"`{name}` must be one of {list(choices)}, got {value!r}.", name)


def closest(name: str, names: Sequence[str], count: int = 3) -> str:
    """The `count` names most similar to `name`, separated by commas, for an error message."""
    return ", ".join(difflib.get_close_matches(name[:_LONGEST_NAME], names, n=count, cutoff=0.0))


def check_generator(generator: Any, device: torch.device) -> None:
    """Raise an error unless `generator` is None or a generator of `device`."""
    if generator is None:
        return
    if not isinstance(generator, Generator):
        raise ArgumentTypeError(
            f"`generator` must be a torch.Generator, got {type(generator)}.", "generator"
        )
    if generator.device != torch.empty(0, device=device).device:
        raise ArgumentError(
            f"`generator` must be on the device of the inputs, {device}, got {generator.device}.",
            "generator",
        )


def check_images(inputs: Any) -> Tensor:
    """Check that `inputs` is one float tensor (B, C, H, W), perhaps in a tuple, and return it."""
    if isinstance(inputs, tuple) and len(inputs) != 1:
        raise ArgumentError(
            f"`inputs` must be one tensor of images, got a tuple of {len(inputs)}: pass the "
            f"model's other arguments as `additional_forward_args`.",
            "inputs",
        )
    x = inputs[0] if isinstance(inputs, tuple) else inputs
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point() or not x.numel():
        description = f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else repr(type(x))
        raise ArgumentError(
            f"`inputs` must be images (B, C, H, W) of floats, got {description}.", "inputs"
        )
    if not bool(torch.isfinite(x).all()):
        raise ArgumentError("`inputs` has values that are not finite.", "inputs")
    return x.detach()


def first_line(message: BaseException | str, length: int = 120) -> str:
    """The first line of an error's text, at most `length` characters; its type if it has none."""
    line = (str(message).splitlines() or [type(message).__name__])[0]
    return line if len(line) <= length else f"{line[: length - 3]}..."


def warn(message: str) -> None:
    """Warn at the innermost caller outside of this package, Captum, torch and Lightning.

    `captum_ext.cli` counts as outside: so the command line recognises the package's own warnings.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_inside(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_inside(frame: FrameType) -> bool:
    """Return whether a frame is code of one of these packages, `captum_ext.cli` excepted."""
    name = str(frame.f_globals.get("__name__"))
    inside = ("captum_ext", "captum", "torch", "lightning", "contextlib")
    return not name.startswith("captum_ext.cli") and name.partition(".")[0] in inside
