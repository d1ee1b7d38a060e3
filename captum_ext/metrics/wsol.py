"""How well a map localises, as weakly supervised localisation is scored: MaxBoxAcc and PxAP.

The conventions are those of Choe et al. ("Evaluating Weakly Supervised Object Localization Methods
Right", CVPR 2020) and their code, so that figures compare with published ones. Maps are in [0, 1];
`captum_ext.imaging.min_max` brings them there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric

from captum_ext._checks import check_choice, check_range
from captum_ext.metrics.localization import checked_maps, checked_masks

CONTOURS = ("largest", "all")
N_THRESHOLDS = 1000

_Array = np.ndarray[Any, np.dtype[Any]]
_IN_PLANE = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])  # eight neighbours
_CROSS = _IN_PLANE * ndimage.generate_binary_structure(2, 1)  # four of them
_VOXELS = 2**24  # that are labelled at once: 64 MiB of labels


# --- boxes ---------------------------------------------------------------------------------------


def box_ious(maps: Tensor, boxes: Sequence[Tensor], contours: str = "largest") -> Tensor:
    r"""The IoU of box and object at each threshold: (B, 1000).

    A map m becomes bytes u = floor(255 m), and at each threshold :math:`\tau` in 0, 0.001, ...,
    0.999 a mask u > int(tau max u), relative to the map's own maximum. Around its regions (eight
    neighbours), and the holes in them, are boxes; of these, and of the object's boxes, the pair
    with the largest IoU counts. As in the authors' code a box ends one pixel behind its region,
    except at the border of the map, both ends of a box are in it, and where nothing is above the
    threshold there is a box of the first pixel.

    Connected regions are found on the CPU, by SciPy: on a smooth map of 64 x 64 that takes a
    fortieth of the time of max-pooling on one thread until nothing changes, and a half on noise.

    Args:
        maps: (B, H, W), or (B, C, H, W) with equal channels, in [0, 1].
        boxes: for each image (n, 4), n at least 1: (x1, y1, x2, y2) in pixels of the map; both ends
            are taken as inside, as the authors do with theirs, which end behind the object.
        contours: "largest": only the region with the largest area inside its outline counts
            (MaxBoxAcc); "all" (MaxBoxAccV2).

    Raises:
        ValueError: maps that are not finite or not in [0, 1]; boxes of another shape or number.

    Reference:
        Choe et al., https://arxiv.org/abs/2001.07437

    Example:
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2:5, 2:6] = 1
        >>> maps[0, 3, 3] = 0.5
        >>> box_ious(maps, [torch.tensor([[2, 2, 6, 5]])])[0, [0, 999]]
        tensor([1., 1.])
    """
    check_choice("contours", contours, CONTOURS)
    values = _in_unit_range(maps)
    if len(boxes) != len(values) or any(
        b.dim() != 2 or b.shape[1] != 4 or not len(b) for b in boxes
    ):
        shapes = [tuple(b.shape) for b in boxes]
        raise ValueError(
            f"`boxes` must be a tensor (n, 4), n at least 1, for each of {len(values)} images, got "
            f"{shapes}."
        )
    found = np.stack(
        [
            _ious((255 * image).astype(np.uint8), true.double().cpu().numpy(), contours == "all")
            for image, true in zip(values.double().cpu().numpy(), boxes, strict=True)
        ]
    )
    return torch.from_numpy(found).to(maps.device)


def _ious(levels: _Array, true: _Array, every: bool) -> _Array:
    """Of one map (H, W) in bytes, at each threshold."""
    thresholds = (np.arange(N_THRESHOLDS) * 0.001 * levels.max()).astype(int)
    cuts, which = np.unique(thresholds, return_inverse=True)
    best = np.empty(len(cuts), dtype=np.float32)
    step = max(_VOXELS // levels.size, 1)
    for first in range(0, len(cuts), step):
        masks = levels > cuts[first : first + step, None, None]
        at, boxes = _every_box(masks) if every else _largest_box(masks)
        ious = _inclusive_iou(_as_the_authors(boxes, levels.shape), true)
        part = np.full(len(masks), -1.0, dtype=np.float32)
        np.maximum.at(part, at, ious)
        nothing = _inclusive_iou(np.zeros((1, 4)), true)
        best[first : first + step] = np.where(part < 0, nothing, part)
    return best[which]


def _every_box(masks: _Array) -> tuple[_Array, _Array]:
    """Index of the mask, and the box of each region and of each hole: (n, 4), half-open."""
    at, boxes = _boxes(ndimage.label(masks, _IN_PLANE)[0])
    holes_at, holes = _boxes(ndimage.label(~masks, _CROSS)[0])
    height, width = masks.shape[1:]
    inner = (holes[:, :2] > 0).all(1) & (holes[:, 2] < width) & (holes[:, 3] < height)
    around = holes[inner] + [-1, -1, 1, 1]  # the outline of a hole is on the region's pixels
    return np.concatenate((at, holes_at[inner])), np.concatenate((boxes, around))


def _largest_box(masks: _Array) -> tuple[_Array, _Array]:
    labels, _ = ndimage.label(masks, _IN_PLANE)
    at, boxes = _boxes(labels)
    bound = (boxes[:, 2] - boxes[:, 0] - 1) * (boxes[:, 3] - boxes[:, 1] - 1)
    chosen: dict[int, tuple[float, int]] = {}
    for i in np.argsort(-bound, kind="stable"):
        best = chosen.get(at[i], (-1.0, 0))
        if bound[i] >= best[0]:  # no outline is larger than its box
            x1, y1, x2, y2 = boxes[i]
            here = labels[at[i], y1:y2, x1:x2] == i + 1
            # Of equal ones the last counts, as OpenCV lists them.
            chosen[at[i]] = max(best, (_outlined_area(here) if bound[i] else 0.0, i))
    kept = [i for _, i in chosen.values()]
    return at[kept], boxes[kept]


def _boxes(labels: _Array) -> tuple[_Array, _Array]:
    """Of each label of a stack of masks: the index of its mask and its box."""
    slices = ndimage.find_objects(labels)
    rows = [(s[0].start, s[2].start, s[1].start, s[2].stop, s[1].stop) for s in slices]
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    return table[:, 0], table[:, 1:]


def _outlined_area(region: _Array) -> float:
    """The area of the polygon through the centres of a region's outermost pixels.

    Of each square of four neighbouring pixels, holes filled, it takes all if four are in the
    region, a half if three are, and else nothing.
    """
    filled = ndimage.binary_fill_holes(region).astype(np.int64)
    four = filled[1:, 1:] + filled[1:, :-1] + filled[:-1, 1:] + filled[:-1, :-1]
    return float((four == 4).sum() + 0.5 * (four == 3).sum())


def _as_the_authors(boxes: _Array, size: tuple[int, ...]) -> _Array:
    height, width = size
    return np.minimum(boxes, [width, height, width - 1, height - 1])


def _inclusive_iou(boxes: _Array, true: _Array) -> _Array:
    """The best IoU of each box (n, 4) with any of the true ones (m, 4)."""
    low = np.maximum(boxes[:, None, :2], true[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], true[None, :, 2:])
    shared = (high - low + 1).clip(0).prod(2)
    areas = [(b[:, 2:] - b[:, :2] + 1).prod(1) for b in (boxes, true)]
    ious: _Array = (shared / (areas[0][:, None] + areas[1] - shared)).max(1)
    return ious


class MaxBoxAcc(Metric):
    r"""The share of images whose object is boxed, at the threshold that is best for all of them.

    .. math:: \operatorname{MaxBoxAcc}(\delta)
        = \max_\tau \frac1N \sum_n [\operatorname{IoU}_n(\tau) \ge \delta]

    One threshold serves all images, so it is chosen with the boxes in hand: an upper bound, by
    design. `MaxBoxAcc()` is the metric of that name; with ``iou_thresholds=(0.3, 0.5, 0.7),
    contours="all"``, each IoU with a threshold of its own and then averaged, it is MaxBoxAccV2.
    V2 does not punish false regions elsewhere in the picture: show `PxAP` beside it.

    Args:
        iou_thresholds: delta.
        contours: "largest" or "all"; see `box_ious`.
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range; see `box_ious` for those of `update`.

    Example:
        >>> metric = MaxBoxAcc(iou_thresholds=(0.3, 0.5, 0.7), contours="all")
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2:5, 2:6] = 1
        >>> metric(maps, [torch.tensor([[2, 2, 6, 4]])])
        tensor(1.)
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("contours", contours, CONTOURS)
        if not len(iou_thresholds):
            raise ValueError("`iou_thresholds` must be at least one number.")
        for threshold in iou_thresholds:
            check_range("iou_thresholds", threshold, 0, 1)
        self.iou_thresholds, self.contours = tuple(iou_thresholds), contours
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
        ious = box_ious(maps, boxes, self.contours)
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


class PxAP(Metric):
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

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    inside: Tensor
    outside: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("inside", "outside"):
            zeros = torch.zeros(N_THRESHOLDS + 1, dtype=torch.int64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, maps: Tensor, masks: Tensor, ignored: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            maps: (B, H, W) or (B, C, H, W), in [0, 1].
            masks: (B, H, W) or (B, 1, H, W), bool: the object's pixels.
            ignored: of the same shape, bool: pixels that do not count. None ignores none.

        Raises:
            ValueError: shapes that do not fit, maps that are not finite or not in [0, 1].
            TypeError: masks that are not bool.
        """
        values, masks = _in_unit_range(maps), checked_masks(masks)
        counts = torch.ones_like(masks) if ignored is None else ~checked_masks(ignored, "ignored")
        if values.shape != masks.shape or counts.shape != masks.shape:
            raise ValueError(
                f"`maps` {tuple(values.shape)}, `masks` {tuple(masks.shape)} and `ignored` must "
                f"agree."
            )
        edges = torch.arange(N_THRESHOLDS + 1, device=values.device) / N_THRESHOLDS
        bins = torch.bucketize(values.contiguous(), edges, right=True) - 1
        size = N_THRESHOLDS + 1
        self.inside = self.inside + torch.bincount(bins[masks & counts], minlength=size)
        self.outside = self.outside + torch.bincount(bins[~masks & counts], minlength=size)

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
