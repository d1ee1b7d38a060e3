"""How well a map's boxes localise, as weakly supervised localisation is scored: MaxBoxAcc.

The figures are those of Choe et al. ("Evaluating Weakly Supervised Object Localization Methods
Right", CVPR 2020). Boxes are compared in plain pixels, or as the authors' code does, for figures
beside published ones. Maps are in [0, 1]; `captum_ext.imaging.min_max` brings them there.
"""

from collections.abc import Sequence
from typing import Any

import higra as hg
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

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
    regions = regions_of(levels, hg.get_8_adjacency_implicit_graph)
    ious = _best_ious(regions.boxes, true, inclusive=False)
    keys = (ious,) if every else (ious, regions.sums(np.ones(image.size)))
    return np.append(ious, 0)[leaders(regions.start, regions.stop, *keys)]


def _published_ious(image: Array, true: Array, every: bool) -> Array:
    """Of one map (H, W), at each threshold."""
    values = (255 * image).astype(np.uint8)
    thresholds = (np.arange(N_THRESHOLDS) * 0.001 * values.max()).astype(int)
    levels = np.searchsorted(thresholds, np.arange(256))[values]
    regions = regions_of(levels, hg.get_8_adjacency_implicit_graph)
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


class MaxBoxAcc(Metric):
    r"""The share of images whose object is boxed, at the threshold that is best for all of them.

    .. math:: \operatorname{MaxBoxAcc}(\delta)
        = \max_\tau \frac1N \sum_n [\operatorname{IoU}_n(\tau) \ge \delta]

    One threshold serves all images, so it is chosen with the boxes in hand: an upper bound, by
    design. `MaxBoxAcc()` is the metric of that name; with ``iou_thresholds=(0.3, 0.5, 0.7),
    contours="all"``, each IoU with a threshold of its own and then averaged, it is MaxBoxAccV2.
    Published figures are of ``convention="wsolevaluation"``. V2 does not punish false regions
    elsewhere in the picture: show `PxAP` beside it.

    Args:
        iou_thresholds: delta.
        contours: "largest" or "all"; see `box_ious`.
        convention: "components" or "wsolevaluation"; see `box_ious`.
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range; see `box_ious` for those of `update`.

    Example:
        >>> metric = MaxBoxAcc(iou_thresholds=(0.3, 0.5, 0.7), contours="all")
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2:5, 2:6] = 1
        >>> metric(maps, [torch.tensor([[2, 2, 6, 4]])])
        tensor(0.6667)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    hits: Tensor
    count: Tensor

    def __init__(
        self,
        iou_thresholds: Sequence[float] = (0.5,),
        contours: str = "largest",
        convention: str = "components",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("contours", contours, CONTOURS)
        check_choice("convention", convention, CONVENTIONS)
        if not len(iou_thresholds):
            raise ValueError("`iou_thresholds` must be at least one number.")
        for threshold in iou_thresholds:
            check_range("iou_thresholds", threshold, 0, 1)
        self.iou_thresholds = tuple(iou_thresholds)
        self.contours, self.convention = contours, convention
        cells = (len(self.iou_thresholds), N_THRESHOLDS)
        self.add_state("hits", torch.zeros(cells, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, maps: Tensor, boxes: Sequence[Tensor], counted: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            maps: (B, H, W) or (B, C, H, W), in [0, 1]; see `box_ious`.
            boxes: for each image (n, 4).
            counted: (B,), bool: images that are not can be no hit. With the images whose label is
                the classifier's first answer, or among its first five, this is top-1 or top-5
                localisation. None counts all.
        """
        ious = box_ious(maps, boxes, self.contours, self.convention)
        if counted is not None:
            if counted.dtype != torch.bool or counted.shape != (len(ious),):
                raise ValueError(
                    f"`counted` must be bool, ({len(ious)},), got {counted.dtype}, "
                    f"{tuple(counted.shape)}."
                )
            ious = torch.where(counted[:, None], ious, -1)
        hits = torch.stack([(ious >= delta).sum(0) for delta in self.iou_thresholds])
        self.hits = self.hits + hits.to(self.hits.device)
        self.count = self.count + len(ious)

    def compute(self) -> Tensor:
        """In [0, 1]; NaN without an image."""
        return self.curves().amax(1).mean()

    def curves(self) -> Tensor:
        """BoxAcc at each IoU and threshold: (len(iou_thresholds), 1000)."""
        return self.hits / self.count
