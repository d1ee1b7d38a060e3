"""Metrics of attributions: plain functions, and torchmetrics classes over them.

Functions give figures of each image, and keep the curves; the classes average them over batches and
processes, and torchmetrics is imported where one of them is asked for.

**Is a map on the object?** Maps and masks, or boxes, are compared: `pointing_game`,
`energy_pointing_game`, `box_ious`, `pixel_counts` and what is made of these.

**Does the model heed what a map marks?** Pixels are shown or hidden in the order of a map, and the
model is asked again: in `insertion` and `deletion` for each share of the pixels, in `average_drop`
and `increase_in_confidence` once, in `road` with what is hidden interpolated. Attributions are
(B, C, H, W) or (B, H, W), of the images' height and width; channels that are all equal count as one
map, others are summed. Insertion, deletion and ROAD see nothing of a map but the order of its
pixels. **Pixels of equal value** come in a random order, the same for all images of a size and for
every call, unless a `generator` draws another: a flat map is a random one, and not one that reads
from the upper left.
"""
# ruff: noqa: F403 (each file says in `__all__` what is public: a new metric needs no line here)

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
