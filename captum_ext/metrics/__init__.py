"""Metrics of attributions: plain functions, and torchmetrics classes over them.

Functions return figures of each image. Classes average them over batches and processes; their first
use imports torchmetrics.

**Is a map on the object?** `pointing_game`, `energy_pointing_game`, `box_ious`, `pixel_counts` and
their classes compare maps with masks or boxes.

**Does the model use the pixels that a map marks?** These metrics hide pixels by their rank in the
map and run the model again. `insertion` and `deletion` do so for many shares of the pixels,
`average_drop` and `increase_in_confidence` once, and `road` imputes the hidden pixels from their
neighbours. Attributions are (B, C, H, W) or (B, H, W), of the images' height and width. Channels
that are all equal count as one map, others are summed. Insertion, deletion and ROAD depend on
nothing but the order of a map's pixels.

**Pixels of equal value** come in a random order, the same for all images of a size and for every
call, unless a `generator` draws another. A flat map thus counts as a random map, and not as one
that starts at the upper left.
"""
# ruff: noqa: F403 (each file lists its public names in `__all__`; a new file needs one line here)

from typing import TYPE_CHECKING, Any

from captum_ext.metrics._definition import DEFINITIONS as _DEFINITIONS
from captum_ext.metrics.boxes import *
from captum_ext.metrics.confidence import *
from captum_ext.metrics.curves import *
from captum_ext.metrics.localization import *
from captum_ext.metrics.masks import *
from captum_ext.metrics.pixels import *
from captum_ext.metrics.road import *
from captum_ext.metrics.wsol import *

if TYPE_CHECKING:
    from captum_ext.metrics.classes import *

_CLASSES = {d.class_name for d in _DEFINITIONS.values()} - {None} | {"MaxBoxAcc", "PxAP", "PxIoU"}

if not TYPE_CHECKING:  # for a type checker, unknown names stay errors
    __all__ = sorted(
        _CLASSES
        | {
            name
            for name, value in globals().items()
            if getattr(value, "__module__", "").startswith(f"{__name__}.")
        }
    )

    def __getattr__(name: str) -> Any:
        if name not in _CLASSES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from captum_ext.metrics import classes

        return getattr(classes, name)

    def __dir__() -> list[str]:
        return sorted(globals().keys() | _CLASSES)
