"""Definitions of metrics: what the torchmetrics classes and `evaluate` have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


def one_value(found: Tensor) -> Tensor:
    """Numbers (B,) as (B, 1)."""
    return found[:, None]


@dataclass(frozen=True)
class Definition:
    """A metric that is the mean of numbers of single images.

    Attributes:
        name: by which `evaluate` knows it.
        function: the public function. After what it takes come its options.
        takes: a "model", images and maps; a map and a "region"; or a "map" alone, scaled to [0, 1].
        class_name: of the torchmetrics class in `captum_ext.metrics`, if there is one.
        higher_is_better: or lower.
        values: turns what `function` returns into numbers (B, n); the first is `evaluate`'s.
        check: raises an error for options that are out of range.
    """

    name: str
    function: Callable[..., Any]
    takes: Literal["model", "region", "map"]
    class_name: str | None = None
    higher_is_better: bool = True
    values: Callable[[Any], Tensor] = one_value
    check: Callable[..., None] | None = None


DEFINITIONS: dict[str, Definition] = {}


def define(
    name: str,
    function: Callable[..., Any],
    takes: Literal["model", "region", "map"],
    class_name: str | None = None,
    **others: Any,
) -> Definition:
    """Make a `Definition`, and enter it among `DEFINITIONS`."""
    DEFINITIONS[name] = Definition(name, function, takes, class_name, **others)
    return DEFINITIONS[name]
