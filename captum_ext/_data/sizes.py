"""The one parser of sizes. It imports neither Pillow nor torchvision."""

from collections.abc import Sequence
from operator import index
from typing import Any

from captum_ext._checks import check_count
from captum_ext._errors import ArgumentError


def height_width(name: str, value: Any) -> tuple[int, int]:
    """(H, W) from one number of pixels or two, also in an array or a tensor.

    Raises:
        ValueError: neither, or no whole number of at least 1.

    Example:
        >>> height_width("size", 224), height_width("size", [4, 6])
        ((224, 224), (4, 6))
    """
    given = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        given = (given, given)
    sides = [_as_int(side) for side in given]
    if len(sides) != 2 or any(isinstance(side, list | tuple) for side in sides):
        raise ArgumentError(
            f"`{name}` must be one or two numbers of pixels, (height, width), got {value!r}.", name
        )
    for side in sides:
        check_count(name, side)
    return sides[0], sides[1]


def _as_int(side: Any) -> Any:
    """NumPy's and torch's integers as Python's; else as it is, for `check_count` to refuse."""
    side = side.tolist() if hasattr(side, "tolist") else side
    return index(side) if hasattr(side, "__index__") and not isinstance(side, bool) else side
