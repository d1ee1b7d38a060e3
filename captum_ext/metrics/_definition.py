"""Definitions of metrics, which the torchmetrics classes and `evaluate` share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


def as_column(values: Tensor) -> Tensor:
    """Numbers (B,) as (B, 1)."""
    return values[:, None]


@dataclass(frozen=True)
class MetricDefinition:
    """A metric that is the mean of numbers of single images.

    Each definition enters itself in `DEFINITIONS`, where `evaluate` finds it.

    Attributes:
        name: the metric's name in `evaluate`.
        function: the public function. Its options follow the arguments that `takes` stands for.
        takes: "model" for a model, images and maps; "region" for maps and masks; "map" for maps
            alone, scaled to [0, 1].
        class_name: the torchmetrics class in `captum_ext.metrics`, if there is one.
        higher_is_better: False where a lower number is the better one.
        values: turns a result of `function` into numbers (B, n); `evaluate` takes the first.
        check: raises an error for options that are out of range.
    """

    name: str
    function: Callable[..., Any]
    takes: Literal["model", "region", "map"]
    class_name: str | None = None
    higher_is_better: bool = True
    values: Callable[[Any], Tensor] = as_column
    check: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        DEFINITIONS[self.name] = self


DEFINITIONS: dict[str, MetricDefinition] = {}
