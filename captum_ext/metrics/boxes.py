"""Boxes of maps at a fixed threshold, their overlap with true boxes, and masks of boxes.

Localisation with the class known (GT-known) takes the `box_from_map`, and its `best_box_iou` of 0.5
or more as a hit. Together with `in_top_k` it becomes top-1 and top-5 localisation:

>>> maps = torch.zeros(2, 8, 8)
>>> maps[:, 2:5, 2:6] = 1
>>> true = [torch.tensor([[2, 2, 6, 6]]), torch.tensor([[0, 0, 8, 8]])]
>>> hits = best_box_iou(box_from_map(maps), true) >= 0.5
>>> hits
tensor([ True, False])
>>> logits, target = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]), torch.tensor([1, 2])
>>> [(hits & in_top_k(logits, target, k)).float().mean().item() for k in (1, 2)]
[0.0, 0.5]

`MaxBoxAcc` sweeps the threshold, and takes the `in_top_k` of its images as `counted`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from captum_ext._checks import check_count, check_positive, check_range, warn
from captum_ext._engine.modules import default_device
from captum_ext._engine.precision import full_precision, twice_square
from captum_ext.metrics._inputs import (
    check_boxes,
    check_corners,
    checked_maps,
    checked_masks,
)

__all__ = [
    "best_box_iou",
    "box_from_map",
    "boxes_to_masks",
    "center_gaussian",
    "in_top_k",
    "masks_to_boxes",
]

# Eight neighbours in a map, and none in the next map.
_NEIGHBOURS = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])


def box_from_map(maps: Tensor, threshold: float = 0.2) -> Tensor:
    """The box of the largest region of each map: (B, 4), int64, (x1, y1, x2, y2), half-open.

    A region consists of pixels above `threshold` times the map's maximum, with eight neighbours
    (Zhou et al., "Learning Deep Features for Discriminative Localization", 2016: 20%, the largest
    component, its tight box). The largest region has the most pixels; of equal ones, the one whose
    first pixel in row-major order comes first is taken. A map without a positive value points
    nowhere: its box is the whole image, and there is a warning. A constant positive map has the
    same box, without a warning.

    Resize maps to the image's size first. SciPy finds the regions of all maps in one call, on the
    CPU. On one thread, that takes 0.5 ms for a smooth map of 224 x 224 and 0.9 ms for noise. Label
    propagation in torch, where pixels take their neighbours' largest label until nothing changes,
    takes 114 ms and 390 ms.

    Args:
        maps: (B, C, H, W) or (B, H, W). Channels that are all equal count as one map, others are
            summed.
        threshold: a share of the map's maximum, at least 0 and below 1. 0.2 (paper).

    Raises:
        ValueError: another shape, values that are not finite, a threshold out of range.
        TypeError: maps that are no tensor.

    Reference:
        Zhou et al., https://arxiv.org/abs/1512.04150

    Example:
        >>> maps = torch.zeros(1, 6, 8)
        >>> maps[0, 1:3, 2:7] = 0.3
        >>> maps[0, 4, 1] = 1
        >>> box_from_map(maps), box_from_map(maps, threshold=0.5)
        (tensor([[2, 1, 7, 3]]), tensor([[1, 4, 2, 5]]))
    """
    from scipy import ndimage

    check_range("threshold", threshold, 0, 1, below=True)
    values = checked_maps(maps, "maps")
    top = values.flatten(1).amax(1)[:, None, None]
    nowhere = top <= 0
    if bool(nowhere.any()):
        warn("some maps have no positive value: their box is the whole image.")
    labels, n_regions = ndimage.label((values > threshold * top).cpu().numpy(), _NEIGHBOURS)
    areas = np.bincount(labels.ravel())
    image = np.empty(n_regions + 1, dtype=np.int64)
    image[labels] = np.arange(len(values))[:, None, None]
    # Take the region with the most pixels of each map. SciPy numbers regions by their first pixels.
    regions = np.arange(1, n_regions + 1)
    regions = regions[np.lexsort((-areas[1:], image[1:]))]
    with_region, first = np.unique(image[regions], return_index=True)
    largest = np.full((len(values), 1, 1), -1)
    largest[with_region, 0, 0] = regions[first]
    masks = torch.from_numpy(labels == largest).to(maps.device)
    return masks_to_boxes(masks | nowhere)


def best_box_iou(predicted: Tensor, true: Sequence[Tensor]) -> Tensor:
    r"""The IoU of each box with the best fitting true box of its image: (B,), in [0, 1].

    .. math:: \max_t \frac{|p \cap t|}{|p| + |t| - |p \cap t|}

    over the true boxes t, with areas :math:`|b| = (x_2 - x_1) (y_2 - y_1)` of half-open boxes.
    `MaxBoxAcc` can follow the published evaluators instead, whose boxes include both ends.

    Args:
        predicted: (B, 4), (x1, y1, x2, y2).
        true: for each image (n, 4), n at least 1. Boxes keep their area outside the image.

    Raises:
        ValueError: another shape or number, no true box, boxes that are not finite or have x2 < x1
            or y2 < y1.

    Example:
        >>> best_box_iou(torch.tensor([[0, 0, 4, 2]]), [torch.tensor([[2, 0, 6, 2], [9, 9, 9, 9]])])
        tensor([0.3333])
    """
    if predicted.dim() != 2 or predicted.shape[1] != 4:
        raise ValueError(f"`predicted` must be (B, 4), got {tuple(predicted.shape)}.")
    check_boxes(true, len(predicted), "true")
    device = predicted.device
    if not len(true):
        return torch.zeros(0, dtype=torch.float32, device=device)
    counts = torch.tensor([len(boxes) for boxes in true], device=device)
    image = torch.arange(len(true), device=device).repeat_interleave(counts)
    # In float64, since float32 holds the sides of pictures exactly, but not all of their products.
    mine, theirs = predicted.double()[image], torch.cat(list(true)).to(device).double()
    check_corners(mine, "predicted")
    check_corners(theirs, "true")
    low = torch.maximum(mine[:, :2], theirs[:, :2])
    high = torch.minimum(mine[:, 2:], theirs[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    union = sum((b[:, 2:] - b[:, :2]).prod(1) for b in (mine, theirs)) - shared
    ious = torch.where(union > 0, shared / union, 0)
    best = ious.new_zeros(len(true)).scatter_reduce(0, image, ious, "amax")
    return best.float()


def in_top_k(logits: Tensor, target: Tensor, k: int = 1) -> Tensor:
    """True for each image whose class has one of the k largest logits: (B,), bool.

    Of classes with equal logits the one with the smaller index comes first, so that a classifier
    with the same logit for all classes is not always right.

    Args:
        logits: (B, K): logits, probabilities or any other score.
        target: (B,), integers.
        k: at least 1.

    Raises:
        ValueError: shapes that do not fit, a class out of range, values that are NaN.

    Example:
        >>> logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
        >>> in_top_k(logits, torch.tensor([2, 1])), in_top_k(logits, torch.tensor([2, 1]), k=2)
        (tensor([False, False]), tensor([True, True]))
    """
    check_count("k", k)
    if logits.dim() != 2:
        raise ValueError(f"`logits` must be (B, K), got {tuple(logits.shape)}.")
    n, n_classes = logits.shape
    if target.shape != (n,) or target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(
            f"`target` must be integers, ({n},), got {target.dtype}, {tuple(target.shape)}."
        )
    if bool(((target < 0) | (target >= n_classes)).any()):
        raise ValueError(f"`target` must be in [0, {n_classes}), the classes of `logits`.")
    if bool(logits.isnan().any()):
        raise ValueError("`logits` has values that are NaN.")
    index = target.to(logits.device, torch.int64)[:, None]
    logit = logits.gather(1, index)
    is_earlier = torch.arange(n_classes, device=logits.device) < index
    hits: Tensor = ((logits > logit) | ((logits == logit) & is_earlier)).sum(1) < k
    return hits


def center_gaussian(
    size: tuple[int, int],
    sigma: float = 0.25,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""A Gaussian around the centre of the image, the baseline of localisation: (H, W), in (0, 1].

    .. math:: \exp\left(-\frac{(y / H - 1/2)^2 + (x / W - 1/2)^2}{2 \sigma^2}\right)

    at the centres of the pixels. Photographers put objects in the middle, so that a method of
    localisation has to beat this map (Choe et al., "Evaluating Weakly Supervised Object
    Localization Methods Right", 2020). The width hardly matters where a threshold is swept, as by
    `MaxBoxAcc` and `PxAP`. It does matter at a fixed threshold.

    Args:
        size: (H, W).
        sigma: the standard deviation in sides of the image, greater than 0.
        dtype: of the map.
        device: of the map.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Choe et al., https://arxiv.org/abs/2001.07437

    Example:
        >>> box_from_map(center_gaussian((100, 200))[None], threshold=0.5)
        tensor([[ 41,  21, 159,  79]])
    """
    if len(size) != 2:
        raise ValueError(f"`size` must be (H, W), got {size}.")
    for side in size:
        check_count("size", side)
    check_positive("sigma", sigma)
    y, x = (
        torch.exp(-(((pixel + 0.5) / n - 0.5) ** 2) / twice_square(sigma))
        for n in size
        for pixel in [torch.arange(n, dtype=torch.float64, device="cpu")]
    )
    device = default_device() if device is None else device
    return torch.outer(y, x).to(device, dtype)


def boxes_to_masks(boxes: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The pixels in any of an image's boxes: (B, H, W), bool.

    Args:
        boxes: for each image (n, 4): (x1, y1, x2, y2) in pixels, half-open: pixel (x, y) is in a
            box where x1 <= x < x2 and y1 <= y < y2. Parts outside the image are cut off.
        size: (H, W).

    Raises:
        ValueError: no image, boxes of another shape, not finite, or with x2 < x1 or y2 < y1.

    Example:
        >>> boxes_to_masks([torch.tensor([[1, 0, 3, 1]])], (2, 4)).int()
        tensor([[[0, 1, 1, 0],
                 [0, 0, 0, 0]]], dtype=torch.int32)
    """
    if not boxes or any(b.dim() != 2 or b.shape[1] != 4 for b in boxes):
        shapes = [tuple(b.shape) for b in boxes]
        raise ValueError(f"`boxes` must be a tensor (n, 4) for each image, got {shapes}.")
    height, width = size
    corners = full_precision(torch.cat(list(boxes)))
    device = corners.device
    check_corners(corners)
    x1, y1, x2, y2 = (
        corners[:, i].ceil().clamp(0, side).long() for i, side in enumerate((width, height) * 2)
    )
    counts = torch.tensor([len(b) for b in boxes], device=device)
    image = torch.arange(len(boxes), device=device).repeat_interleave(counts)
    # The sums of +1 and -1 at a box's corners along both axes are 1 in the box and 0 outside.
    edges = torch.zeros(len(boxes), height + 1, width + 1, dtype=torch.int32, device=device)
    ones = edges.new_ones(len(corners))
    for y, x, signs in ((y1, x1, ones), (y1, x2, -ones), (y2, x1, -ones), (y2, x2, ones)):
        edges.index_put_((image, y, x), signs, accumulate=True)
    return edges.cumsum(1).cumsum(2)[:, :height, :width] > 0


def masks_to_boxes(masks: Tensor) -> Tensor:
    """The smallest box around each mask: (B, 4), int64, (x1, y1, x2, y2) in pixels, half-open.

    Args:
        masks: (B, H, W) or (B, 1, H, W), bool. An empty mask has the box (0, 0, 0, 0).

    Raises:
        ValueError: another shape.
        TypeError: masks that are not bool.

    Example:
        >>> masks_to_boxes(torch.tensor([[[False, True, True], [False, False, False]]]))
        tensor([[1, 0, 3, 1]])
    """
    masks = checked_masks(masks)
    (x1, x2), (y1, y2) = _start_and_stop(masks.any(1)), _start_and_stop(masks.any(2))
    return torch.stack((x1, y1, x2, y2), 1)


def _start_and_stop(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Start and stop of the true entries in each row of (B, n); 0 and 0 for a row without any."""
    entries = occupied.int()
    stop = entries.shape[1] - entries.flip(1).argmax(1)
    return entries.argmax(1), stop * entries.amax(1)
