"""Boxes of maps at all thresholds against true boxes, for MaxBoxAcc.

This is the score of weakly supervised localisation by Choe et al. ("Evaluating Weakly Supervised
Object Localization Methods Right", CVPR 2020). Boxes are compared in plain pixels, or as the
authors' code does, for figures beside published ones. Maps are in [0, 1];
`captum_ext.imaging.min_max` scales them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captum_ext._checks import check_choice, check_range
from captum_ext._errors import ArgumentError
from captum_ext.metrics._inputs import check_boxes, check_corners, checked_unit_maps
from captum_ext.metrics._regions import (
    N_THRESHOLDS,
    Array,
    find_holes,
    find_regions,
    greatest_regions,
    outlined_areas,
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

    Thresholds :math:`\tau` are 0, 0.001, ..., 0.999 of the map's own maximum. The pixels above a
    threshold form regions (with eight neighbours), and each region has a box. The pair of a
    region's box and a true box with the largest IoU counts. There are two conventions:

    - "components": a mask is m > tau max m; boxes are tight and half-open; areas are numbers of
      pixels. All regions that are equally large count as the largest, so that a map and its mirror
      image agree. Where no pixel is above the threshold, as in a map of zeros, the IoU is 0.
    - "wsolevaluation" follows the authors' code, which uses OpenCV: a map becomes bytes
      u = floor(255 m), and a mask is u > int(tau max u). Holes have boxes too, through the pixels
      around them. A box ends one pixel behind its region, except at the border of the map, and
      includes both ends. Areas are those of polygons through the centres of the outermost pixels.
      Of equally large regions, the one whose first pixel comes last, row by row, counts. Where no
      pixel is above the threshold, the box is that of the map's first pixel.

    The regions of all masks are the nodes of one tree, which Higra builds, so that no mask is
    labelled by itself. The tree is built on the CPU, image by image, as its growth is sequential.
    It takes 10 ms at 224 x 224.

    Args:
        maps: (B, H, W), or (B, C, H, W) with equal channels, in [0, 1].
        boxes: for each image (n, 4), n at least 1: (x1, y1, x2, y2) in pixels of the map,
            half-open. A box that reaches out of the map keeps its full area. "wsolevaluation"
            takes both ends as inside, as the authors do, although their boxes end behind the
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
    for true in boxes:
        check_corners(true)
    ious_of = _ious_of_components if convention == "components" else _ious_of_wsolevaluation
    ious = np.empty((len(values), N_THRESHOLDS), dtype=np.float32)
    for i, map_ in enumerate(values.double().cpu().numpy()):
        ious[i] = ious_of(map_, boxes[i].double().cpu().numpy(), contours == "all")
    return torch.from_numpy(ious).to(maps.device)


def _ious_of_components(map_: Array, true: Array, all_regions: bool) -> Array:
    """The IoUs of one map (H, W) at each threshold, by "components"."""
    levels = np.searchsorted(np.arange(N_THRESHOLDS) / N_THRESHOLDS * map_.max(), map_)
    regions = find_regions(levels, neighbours=8)
    ious = _best_ious(regions.boxes, true, inclusive=False)
    keys = (ious,) if all_regions else (ious, regions.sum_pixels(np.ones(map_.size)))
    return np.append(ious, 0)[greatest_regions(regions.start, regions.stop, *keys)]


def _ious_of_wsolevaluation(map_: Array, true: Array, all_regions: bool) -> Array:
    """The IoUs of one map (H, W) at each threshold, by "wsolevaluation"."""
    values = (255 * map_).astype(np.uint8)
    thresholds = (np.arange(N_THRESHOLDS) * 0.001 * values.max()).astype(int)
    levels = np.searchsorted(thresholds, np.arange(256))[values]
    regions = find_regions(levels, neighbours=8)
    start, stop, boxes = spans = regions.start, regions.stop, regions.boxes
    if all_regions:
        pairs = zip(spans, find_holes(levels), strict=True)
        start, stop, boxes = (np.concatenate(pair) for pair in pairs)
    height, width = map_.shape
    boxes = np.minimum(boxes, [width, height, width - 1, height - 1])
    ious = _best_ious(boxes, true, inclusive=True)
    keys = (ious,) if all_regions else (regions.first, outlined_areas(levels, regions))
    first_pixel = _best_ious(np.zeros((1, 4)), true, inclusive=True)
    return np.append(ious, first_pixel)[greatest_regions(start, stop, *keys)]


def _best_ious(boxes: Array, true: Array, inclusive: bool) -> Array:
    """The best IoU of each box (n, 4) with any of the true ones (m, 4): (n,)."""
    low = np.maximum(boxes[:, None, :2], true[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], true[None, :, 2:])
    shared = (high - low + inclusive).clip(0).prod(2)
    areas = [(b[:, 2:] - b[:, :2] + inclusive).prod(1) for b in (boxes, true)]
    ious: Array = (shared / (areas[0][:, None] + areas[1] - shared)).max(1)
    return ious


# --- figures of all images -----------------------------------------------------------------------


@dataclass(frozen=True)
class BoxOptions:
    """The options of `MaxBoxAcc`."""

    iou_thresholds: Sequence[float] = (0.5,)
    contours: str = "largest"
    convention: str = "components"

    def __post_init__(self) -> None:
        check_choice("contours", self.contours, CONTOURS)
        check_choice("convention", self.convention, CONVENTIONS)
        value = self.iou_thresholds
        thresholds = () if isinstance(value, str) or not isinstance(value, Iterable) else (*value,)
        if not thresholds:
            raise ArgumentError(
                f"`iou_thresholds` must be at least one number in a tuple, got {value!r}.",
                "iou_thresholds",
            )
        object.__setattr__(self, "iou_thresholds", thresholds)  # a tuple, which is hashable
        for threshold in thresholds:
            check_range("iou_thresholds", threshold, 0, 1)


def box_hits(ious: Tensor, options: BoxOptions, counted: Tensor | None = None) -> Tensor:
    """Turn the IoUs (B, 1000) of `box_ious` into hits (B, IoUs, 1000), bool.

    Images that are not `counted` (B,), bool, have no hits.
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
    """BoxAcc (..., IoUs, 1000), from the numbers of hits (..., IoUs, 1000) and of images (...)."""
    return hits.float() / count[..., None, None]


def max_box_acc(hits: Tensor, count: Tensor) -> Tensor:
    """MaxBoxAcc (...), from the same; NaN without an image."""
    best: Tensor = hits.amax(-1).float() / count[..., None]
    return best.mean(-1)
