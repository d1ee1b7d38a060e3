"""The one parser of sizes. It imports neither Pillow nor torchvision."""

from collections.abc import Sequence
from operator import index
from typing import Any

from captum_ext._checks import check_count


def height_width(name: str, value: Any) -> tuple[int, int]:
    """(H, W) from one number of pixels or two.

    Raises:
        ValueError: neither, or a number below 1.

    Example:
        >>> height_width("size", 224), height_width("size", [4, 6])
        ((224, 224), (4, 6))
    """
    given = value if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    sides = [_as_int(side) for side in given]
    if len(sides) != 2:
        raise ValueError(
            f"`{name}` must be one or two numbers of pixels, (height, width), got {value!r}."
        )
    for side in sides:
        check_count(name, side)
    return sides[0], sides[1]


def _as_int(side: Any) -> Any:
    """NumPy's integers as Python's; anything else stays, for `check_count` to refuse."""
    return index(side) if hasattr(side, "__index__") and not isinstance(side, bool) else side
