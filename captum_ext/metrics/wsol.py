"""How well a map's boxes localise, as weakly supervised localisation is scored: MaxBoxAcc.

The figures are those of Choe et al. ("Evaluating Weakly Supervised Object Localization Methods
Right", CVPR 2020). Boxes are compared in plain pixels, or as the authors' code does, for figures
beside published ones. Maps are in [0, 1]; `captum_ext.imaging.min_max` brings them there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captum_ext._checks import check_choice, check_range
from captum_ext.metrics._inputs import check_boxes, check_corners, checked_unit_maps
from captum_ext.metrics._regions import (
    N_THRESHOLDS,
    Array,
    holes_of,
    leaders,
    outlined_areas,
    regions_of,
)

__all__ = ["box_ious"]

CONTOURS = ("largest", "all")
CONVENTIONS = ("components", "wsolevaluation")


def box_ious(
    maps: Tensor,
    boxes: Sequence[Tensor],
    contours: str = "largest",
    convention: str = "components",
) -> Tensor:
    r"""The IoU of box and object at each threshold: (B, 1000).

    Thresholds :math:`\tau` are 0, 0.001, ..., 0.999 of the map's own maximum. The pixels above one
    are regions (eight neighbours) with boxes; of these, and of the object's boxes, the pair with
    the largest IoU counts. There are two conventions:

    - "components": a mask is m > tau max m; boxes are tight and half-open; areas are numbers of
      pixels. All regions that are equally large count as the largest, so that a map and its mirror
      image agree. Where nothing is above the threshold, as in a map of zeros, the IoU is 0.
    - "wsolevaluation", what the authors' code does with OpenCV: a map becomes bytes
      u = floor(255 m), and a mask is u > int(tau max u). Holes have boxes too, through the pixels
      around them. A box ends one pixel behind its region, except at the border of the map, and both
      ends are in it. Areas are those within outlines, polygons through the centres of the outermost
      pixels; of equally large regions the one whose first pixel, row by row, is the last counts.
      Where nothing is above the threshold there is a box of the first pixel.

    Nothing is labelled 1000 times: the regions of all masks are the nodes of one tree, which Higra
    builds. It does so on the CPU, image by image: growing such a tree is sequential, and it takes
    10 ms at 224 x 224.

    Args:
        maps: (B, H, W), or (B, C, H, W) with equal channels, in [0, 1].
        boxes: for each image (n, 4), n at least 1: (x1, y1, x2, y2) in pixels of the map,
            half-open. Nothing is cut off of a box that is outside the map, in whole or in part. To
            "wsolevaluation" both ends are inside, as the authors take theirs, which end behind the
            object.
        contours: "largest": only the region with the largest area counts (MaxBoxAcc); "all"
            (MaxBoxAccV2).
        convention: "components" or "wsolevaluation".

    Raises:
        ValueError: maps that are not finite or not in [0, 1]; boxes of another shape or number, not
            finite, or with x2 < x1 or y2 < y1.

    Reference:
        Choe et al., https://arxiv.org/abs/2001.07437

    Example:
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2:5, 2:6] = 0.4
        >>> maps[0, 2:5, 2:4] = 1
        >>> box_ious(maps, [torch.tensor([[2, 2, 6, 5]])])[0, [0, 999]]
        tensor([1.0000, 0.5000])
    """
    check_choice("contours", contours, CONTOURS)
    check_choice("convention", convention, CONVENTIONS)
    values = checked_unit_maps(maps)
    check_boxes(boxes, len(values))
    for one in boxes:
        check_corners(one)
    ious = _ious if convention == "components" else _published_ious
    found = np.empty((len(values), N_THRESHOLDS), dtype=np.float32)
    for i, image in enumerate(values.double().cpu().numpy()):
        found[i] = ious(image, boxes[i].double().cpu().numpy(), contours == "all")
    return torch.from_numpy(found).to(maps.device)


def _ious(image: Array, true: Array, every: bool) -> Array:
    """Of one map (H, W), at each threshold."""
    levels = np.searchsorted(np.arange(N_THRESHOLDS) / N_THRESHOLDS * image.max(), image)
    regions = regions_of(levels, neighbours=8)
    ious = _best_ious(regions.boxes, true, inclusive=False)
    keys = (ious,) if every else (ious, regions.sums(np.ones(image.size)))
    return np.append(ious, 0)[leaders(regions.start, regions.stop, *keys)]


def _published_ious(image: Array, true: Array, every: bool) -> Array:
    """Of one map (H, W), at each threshold."""
    values = (255 * image).astype(np.uint8)
    thresholds = (np.arange(N_THRESHOLDS) * 0.001 * values.max()).astype(int)
    levels = np.searchsorted(thresholds, np.arange(256))[values]
    regions = regions_of(levels, neighbours=8)
    start, stop, boxes = spans = regions.start, regions.stop, regions.boxes
    if every:
        both = zip(spans, holes_of(levels), strict=True)
        start, stop, boxes = (np.concatenate(parts) for parts in both)
    height, width = image.shape
    boxes = np.minimum(boxes, [width, height, width - 1, height - 1])
    ious = _best_ious(boxes, true, inclusive=True)
    keys = (ious,) if every else (regions.first, outlined_areas(levels, regions))
    nothing = _best_ious(np.zeros((1, 4)), true, inclusive=True)
    return np.append(ious, nothing)[leaders(start, stop, *keys)]


def _best_ious(boxes: Array, true: Array, inclusive: bool) -> Array:
    """The best IoU of each box (n, 4) with any of the true ones (m, 4)."""
    low = np.maximum(boxes[:, None, :2], true[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], true[None, :, 2:])
    shared = (high - low + inclusive).clip(0).prod(2)
    areas = [(b[:, 2:] - b[:, :2] + inclusive).prod(1) for b in (boxes, true)]
    ious: Array = (shared / (areas[0][:, None] + areas[1] - shared)).max(1)
    return ious


# --- of all images -------------------------------------------------------------------------------


@dataclass(frozen=True)
class BoxOptions:
    """What counts as a hit; see `MaxBoxAcc`."""

    iou_thresholds: Sequence[float] = (0.5,)
    contours: str = "largest"
    convention: str = "components"

    def __post_init__(self) -> None:
        check_choice("contours", self.contours, CONTOURS)
        check_choice("convention", self.convention, CONVENTIONS)
        given = self.iou_thresholds
        if not isinstance(given, Iterable) or isinstance(given, str) or not (found := tuple(given)):
            raise ValueError(
                f"`iou_thresholds` must be at least one number in a tuple, got {given!r}."
            )
        object.__setattr__(self, "iou_thresholds", found)  # hashable, as a frozen class has them
        for threshold in self.iou_thresholds:
            check_range("iou_thresholds", threshold, 0, 1)


def zeros(options: BoxOptions) -> tuple[Tensor, Tensor]:
    """Numbers of hits, (IoUs, 1000), and of images."""
    hits = torch.zeros(len(options.iou_thresholds), N_THRESHOLDS, dtype=torch.int64)
    return hits, torch.zeros((), dtype=torch.int64)


def box_hits(ious: Tensor, options: BoxOptions, counted: Tensor | None = None) -> Tensor:
    """Which boxes are hits, of `box_ious` (B, 1000): (B, IoUs, 1000), bool.

    Images that are not `counted` (B,), bool, have none.
    """
    hits = torch.stack([ious >= delta for delta in options.iou_thresholds], 1)
    if counted is None:
        return hits
    if counted.dtype != torch.bool or counted.shape != (len(ious),):
        raise ValueError(
            f"`counted` must be bool, ({len(ious)},), got {counted.dtype}, {tuple(counted.shape)}."
        )
    return hits & counted[:, None, None]


def box_acc(hits: Tensor, count: Tensor) -> Tensor:
    """BoxAcc at each IoU and threshold, of numbers of hits (..., IoUs, 1000) and images (...)."""
    return hits / count[..., None, None]


def max_box_acc(hits: Tensor, count: Tensor) -> Tensor:
    """MaxBoxAcc (...), of the same; NaN without an image."""
    best: Tensor = hits.amax(-1) / count[..., None]
    return best.mean(-1)
