"""Arguments that are a height and a width. This module imports neither Pillow nor torchvision."""

from collections.abc import Sequence
from operator import index
from typing import Any

from captum_ext._checks import check_count
from captum_ext._errors import ArgumentError


def height_width(name: str, value: Any) -> tuple[int, int]:
    """Parse a size in pixels, (H, W) or one number for both.

    Args:
        name: the argument's name, for errors.
        value: one integer or two, also in an array or a tensor.

    Raises:
        ValueError: another number of values, or values that are no integers of at least 1.

    Example:
        >>> height_width("size", 224), height_width("size", [4, 6])
        ((224, 224), (4, 6))
    """
    size = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(size, Sequence) or isinstance(size, str | bytes):
        size = (size, size)
    sides = [_as_int(side) for side in size]
    if len(sides) != 2 or any(isinstance(side, list | tuple) for side in sides):
        raise ArgumentError(
            f"`{name}` must be one or two numbers of pixels, (height, width), got {value!r}.", name
        )
    for side in sides:
        check_count(name, side)
    return sides[0], sides[1]


def _as_int(side: Any) -> Any:
    """Convert integers of NumPy and torch to int. Other values stay; `check_count` rejects them."""
    side = side.tolist() if hasattr(side, "tolist") else side
    return index(side) if hasattr(side, "__index__") and not isinstance(side, bool) else side
