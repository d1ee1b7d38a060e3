"""How well a map localises, as weakly supervised localisation is scored: MaxBoxAcc and PxAP.

The figures are those of Choe et al. ("Evaluating Weakly Supervised Object Localization Methods
Right", CVPR 2020). Boxes are compared in plain pixels, or as the authors' code does, for figures
beside published ones. Maps are in [0, 1]; `captum_ext.imaging.min_max` brings them there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import higra as hg
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric

from captum_ext._checks import check_choice, check_range
from captum_ext.metrics.localization import checked_maps
from captum_ext.metrics.pixels import PixelCounts

CONTOURS = ("largest", "all")
CONVENTIONS = ("components", "wsolevaluation")
N_THRESHOLDS = 1000

_Array = np.ndarray[Any, np.dtype[Any]]
_EIGHT = np.ones((3, 3))  # neighbours


# --- boxes ---------------------------------------------------------------------------------------


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
            half-open. To "wsolevaluation" both ends are inside, as the authors take theirs, which
            end behind the object.
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
    values = _in_unit_range(maps)
    if len(boxes) != len(values) or any(
        b.dim() != 2 or b.shape[1] != 4 or not len(b) for b in boxes
    ):
        shapes = [tuple(b.shape) for b in boxes]
        raise ValueError(
            f"`boxes` must be a tensor (n, 4), n at least 1, for each of {len(values)} images, got "
            f"{shapes}."
        )
    ordered = [(b[:, 2:] >= b[:, :2]).all() & torch.isfinite(b).all() for b in boxes]
    if not all(ordered):
        raise ValueError("`boxes` must be finite and have x1 <= x2 and y1 <= y2.")
    ious = _ious if convention == "components" else _published_ious
    found = np.empty((len(values), N_THRESHOLDS), dtype=np.float32)
    for i, image in enumerate(values.double().cpu().numpy()):
        found[i] = ious(image, boxes[i].double().cpu().numpy(), contours == "all")
    return torch.from_numpy(found).to(maps.device)


def _ious(image: _Array, true: _Array, every: bool) -> _Array:
    """Of one map (H, W), at each threshold."""
    levels = np.searchsorted(np.arange(N_THRESHOLDS) / N_THRESHOLDS * image.max(), image)
    regions = _regions(levels, hg.get_8_adjacency_implicit_graph)
    ious = _best_ious(regions.boxes, true, inclusive=False)
    keys = (ious,) if every else (ious, regions.sums(np.ones(image.size)))
    return np.append(ious, 0)[_leaders(regions.start, regions.stop, *keys)]


def _published_ious(image: _Array, true: _Array, every: bool) -> _Array:
    """Of one map (H, W), at each threshold."""
    values = (255 * image).astype(np.uint8)
    thresholds = (np.arange(N_THRESHOLDS) * 0.001 * values.max()).astype(int)
    levels = np.searchsorted(thresholds, np.arange(256))[values]
    regions = _regions(levels, hg.get_8_adjacency_implicit_graph)
    start, stop, boxes = spans = regions.start, regions.stop, regions.boxes
    if every:
        both = zip(spans, _holes(levels), strict=True)
        start, stop, boxes = (np.concatenate(parts) for parts in both)
    height, width = image.shape
    boxes = np.minimum(boxes, [width, height, width - 1, height - 1])
    ious = _best_ious(boxes, true, inclusive=True)
    keys = (ious,) if every else (regions.first, _outlined_areas(levels, regions))
    nothing = _best_ious(np.zeros((1, 4)), true, inclusive=True)
    return np.append(ious, nothing)[_leaders(start, stop, *keys)]


# In what follows `levels` (H, W) says how many thresholds are below a pixel: mask k is levels > k.


@dataclass(frozen=True)
class _Regions:
    """Connected regions: each is one of mask k for start <= k < stop."""

    start: _Array
    stop: _Array
    first: _Array  # pixel, row by row
    boxes: _Array  # (n, 4), half-open
    tree: Any
    nodes: _Array

    def sums(self, amounts: _Array) -> _Array:
        """Over the pixels of each region, of amounts (H * W, ...)."""
        sums: _Array = hg.accumulate_sequential(self.tree, amounts, hg.Accumulators.sum)
        return sums[self.nodes]


def _regions(levels: _Array, adjacency: Callable[[tuple[int, ...]], Any]) -> _Regions:
    """The regions of all masks: the nodes of the max-tree."""
    tree, stop = hg.component_tree_max_tree(adjacency(levels.shape), levels.astype(np.int16))
    stop = stop.astype(np.int64)
    start = stop[tree.parents()]
    start[-1] = 0  # of the root, the whole image
    nodes = tree.num_leaves() + np.flatnonzero((start < stop)[tree.num_leaves() :])
    index, width = np.arange(levels.size), levels.shape[1]
    ends = np.stack((index, index % width, -index, -(index % width)), 1)
    ends = hg.accumulate_sequential(tree, ends, hg.Accumulators.min)[nodes].astype(np.int64)
    first, left, last, right = ends.T * [[1], [1], [-1], [-1]]
    boxes = np.stack((left, first // width, right + 1, last // width + 1), 1)
    return _Regions(start[nodes], stop[nodes], first, boxes, tree, nodes)


def _holes(levels: _Array) -> tuple[_Array, _Array, _Array]:
    """Start and stop of all holes in regions, and the boxes of their outlines on the regions."""
    holes = _regions(N_THRESHOLDS - levels, hg.get_4_adjacency_implicit_graph)
    height, width = levels.shape
    inner = (holes.boxes > 0).all(1) & (holes.boxes[:, 2:] < [width, height]).all(1)
    start, stop = N_THRESHOLDS - holes.stop[inner], N_THRESHOLDS - holes.start[inner]
    return start, stop, holes.boxes[inner] + [-1, -1, 1, 1]


def _leaders(start: _Array, stop: _Array, *keys: _Array) -> _Array:
    """Which region is the greatest in each mask, by the last key first; -1 where there is none."""
    order = np.lexsort(keys)
    rank = np.argsort(order)
    # Any span of masks is two, overlapping, of 2**p: ranks[p, k] is for masks k to k + 2**p.
    power = np.frexp(stop - start)[1] - 1
    ranks = np.full((N_THRESHOLDS.bit_length(), N_THRESHOLDS), -1)
    np.maximum.at(ranks, (power, start), rank)
    np.maximum.at(ranks, (power, stop - 2**power), rank)
    for p in range(len(ranks) - 1, 0, -1):
        half = 2 ** (p - 1)
        ranks[p - 1] = np.maximum(ranks[p - 1], ranks[p])
        ranks[p - 1, half:] = np.maximum(ranks[p - 1, half:], ranks[p, :-half])
    leaders: _Array = np.append(order, -1)[ranks[0]]
    return leaders


def _best_ious(boxes: _Array, true: _Array, inclusive: bool) -> _Array:
    """The best IoU of each box (n, 4) with any of the true ones (m, 4)."""
    low = np.maximum(boxes[:, None, :2], true[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], true[None, :, 2:])
    shared = (high - low + inclusive).clip(0).prod(2)
    areas = [(b[:, 2:] - b[:, :2] + inclusive).prod(1) for b in (boxes, true)]
    ious: _Array = (shared / (areas[0][:, None] + areas[1] - shared)).max(1)
    return ious


# --- areas within outlines -----------------------------------------------------------------------


def _outlined_areas(levels: _Array, regions: _Regions) -> _Array:
    """The area within each region's outline, or less where that cannot make it the largest.

    Without a hole it is the region's own area, else between that and its box's: holes are filled
    only where more than one region of a mask may be the largest.
    """
    areas: _Array
    areas, euler = regions.sums(_by_squares(levels)).T
    sides = regions.boxes[:, 2:] - regions.boxes[:, :2] - 1
    most = np.where(euler == 1, areas, sides.prod(1))
    # What the largest of each mask has at least; from mask to mask, which are nested, it falls.
    least = np.zeros(N_THRESHOLDS)
    np.maximum.at(least, regions.stop - 1, areas)
    least = np.maximum.accumulate(least[::-1])[::-1]
    # A region may be the largest of mask k for since <= k < stop.
    since = np.maximum(regions.start, np.searchsorted(-least, -most)).clip(max=regions.stop)
    begin, end = (np.bincount(k, minlength=N_THRESHOLDS + 1) for k in (since, regions.stop))
    rivals = (begin - end).cumsum()
    contested = np.append(0, (rivals > 1).cumsum())
    for i in np.flatnonzero((euler < 1) & (contested[regions.stop] > contested[since])):
        x1, y1, x2, y2 = regions.boxes[i]
        labels, _ = ndimage.label(levels[y1:y2, x1:x2] > regions.start[i], _EIGHT)
        areas[i] = _outlined_area(labels == labels[0, regions.first[i] % levels.shape[1] - x1])
    return areas


def _by_squares(levels: _Array) -> _Array:
    """What each pixel adds to the area and to the Euler number of the regions it is in: (H * W, 2).

    The area within a region's outline, holes apart, is a half for each square of four pixels of
    which three are in the region, and 1 where all are. The Euler number, 1 less the number of
    holes, is pixels - pairs side by side - squares with just a diagonal in the region + full
    squares. A pair is in the regions that its lower pixel is in, a full square in those of its
    lowest; a diagonal, in those of its lower pixel, is no longer alone in those of a third.
    """
    pixels = np.arange(levels.size).reshape(levels.shape)
    order = levels * levels.size + pixels  # without ties
    four = np.stack((order[1:, 1:], order[1:, :-1], order[:-1, 1:], order[:-1, :-1]))
    lowest, second, third, highest = np.sort(four.reshape(4, -1), axis=0) % levels.size
    pairs = np.minimum(order[1:], order[:-1]), np.minimum(order[:, 1:], order[:, :-1])
    is_black = np.indices(levels.shape).sum(0).ravel() % 2 == 0  # of a chessboard
    diagonal = is_black[third] == is_black[highest]

    def count(pixels: _Array) -> _Array:
        return np.bincount(pixels.ravel() % levels.size, minlength=levels.size)

    area = 0.5 * (count(lowest) + count(second))
    euler = 1 - count(pairs[0]) - count(pairs[1]) + count(lowest)
    euler += count(second[diagonal]) - count(third[diagonal])
    return np.stack((area, euler), 1)


def _outlined_area(region: _Array) -> float:
    """The area of the polygon through the centres of a region's outermost pixels.

    Of each square of four neighbouring pixels, holes filled, it takes all if four are in the
    region, a half if three are, and else nothing.
    """
    outside, _ = ndimage.label(np.pad(~region, 1, constant_values=True))
    filled = (outside != outside[0, 0]).astype(np.int64)
    four = filled[1:, 1:] + filled[1:, :-1] + filled[:-1, 1:] + filled[:-1, :-1]
    return float((four == 4).sum() + 0.5 * (four == 3).sum())


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


# --- pixels --------------------------------------------------------------------------------------


class PxAP(PixelCounts):
    r"""The average precision of the pixels of all images together.

    Of thresholds 0, 0.001, ..., 0.999, 1 (not relative to a map's maximum),

    .. math:: \operatorname{PxAP} = \sum_l \operatorname{Prec}(\tau_l)
        (\operatorname{Rec}(\tau_l) - \operatorname{Rec}(\tau_{l+1}))

    with the precision and recall of all pixels at or above a threshold. A map that is constant has
    the share of the object's pixels.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: see `update`.

    Reference:
        Choe et al., https://arxiv.org/abs/2001.07437

    Example:
        >>> metric = PxAP()
        >>> maps = torch.tensor([[[0.9, 0.4], [0.4, 0.1]]])
        >>> metric(maps, torch.tensor([[[True, True], [False, False]]]))
        tensor(0.8333)
    """

    def compute(self) -> Tensor:
        """In [0, 1]; NaN where no pixel was in a mask."""
        tp, fp = (counts.flip(0).cumsum(0).double() for counts in (self.inside, self.outside))
        precision = tp / (tp + fp).clamp(min=1)
        recall = tp / tp[-1]
        return (precision * torch.diff(recall, prepend=recall.new_zeros(1))).sum().float()


def _in_unit_range(maps: Tensor) -> Tensor:
    values = checked_maps(maps, "maps")
    if bool((values < 0).any() | (values > 1).any()):
        raise ValueError("`maps` must be in [0, 1]: bring them there by `imaging.min_max`.")
    return values
