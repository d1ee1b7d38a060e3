"""Pixels of maps against pixels of masks, at all thresholds at once."""

import torch
from torch import Tensor

from captum_ext.metrics._inputs import checked_masks, checked_unit_maps

__all__ = ["pixel_counts", "pixel_iou"]

N_STEPS = 1000


def pixel_counts(
    maps: Tensor, masks: Tensor, ignored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How many pixels have which value, inside the masks and outside: two (B, 1001), int64.

    Cell l counts the pixels with l / 1000 <= value < (l + 1) / 1000, cell 1000 those of 1. Their
    sums from l on are the true and the false positives at the threshold l / 1000, which is all
    that `PxAP` and `PxIoU` need to know of an image.

    Args:
        maps: (B, H, W) or (B, C, H, W), in [0, 1]. Channels that are all equal count as one map,
            others are summed.
        masks: (B, H, W) or (B, 1, H, W), bool: the object's pixels.
        ignored: of the same shape, bool: pixels that do not count. None ignores none.

    Raises:
        ValueError: shapes that do not fit, maps that are not finite or not in [0, 1].
        TypeError: masks that are not bool.

    Example:
        >>> maps = torch.tensor([[[0.0, 0.5], [0.5004, 1.0]]])
        >>> masks = torch.tensor([[[False, True], [True, False]]])
        >>> [counts[0, [0, 500, 1000]].tolist() for counts in pixel_counts(maps, masks)]
        [[0, 2, 0], [1, 0, 1]]
    """
    values, masks = checked_unit_maps(maps), checked_masks(masks)
    count = torch.ones_like(masks) if ignored is None else ~checked_masks(ignored, "ignored")
    if values.shape != masks.shape or count.shape != masks.shape:
        raise ValueError(
            f"`maps` {tuple(values.shape)}, `masks` {tuple(masks.shape)} and `ignored` must agree."
        )
    # On the CPU: a GPU multiplies by 1 / 1000, which is off by a bit in every second edge.
    edges = (torch.arange(N_STEPS + 1, dtype=values.dtype) / N_STEPS).to(values.device)
    n, n_cells = len(values), N_STEPS + 1
    row = 2 * torch.arange(n, device=values.device)[:, None, None] + (~masks).long()
    cells = row * n_cells + torch.bucketize(values.contiguous(), edges, right=True) - 1
    found = torch.bincount(cells[count], minlength=2 * n * n_cells).view(n, 2, n_cells)
    return found[:, 0], found[:, 1]


def pixel_iou(maps: Tensor, masks: Tensor, ignored: Tensor | None = None) -> Tensor:
    """The IoU of each mask and the pixels at or above each threshold: (B, 1001), float32.

    Thresholds are 0, 0.001, ..., 1, and not relative to a map's maximum. Pixels that are ignored
    are in no union. Where the union is empty it is 0, as it is by `mask_iou`.

    Args:
        maps: see `pixel_counts`, as for the rest and for what is raised.
        masks: (B, H, W) or (B, 1, H, W), bool.
        ignored: of the same shape, bool, or None.

    Example:
        >>> maps = torch.tensor([[[0.9, 0.6, 0.5]]])
        >>> masks = torch.tensor([[[False, True, True]]])
        >>> pixel_iou(maps, masks)[0, [0, 550, 1000]]
        tensor([0.6667, 0.3333, 0.0000])
    """
    return _ious(*pixel_counts(maps, masks, ignored)).float()


# --- of counts, pooled or of one image: two (..., 1001) -------------------------------------------


def _ious(inside: Tensor, outside: Tensor) -> Tensor:
    """The IoU at each threshold, (..., 1001), float64."""
    tp, fp = (counts.flip(-1).cumsum(-1).flip(-1) for counts in (inside, outside))
    union = inside.sum(-1, keepdim=True) + fp  # what is found or missed, and what is found wrongly
    return tp.double() / union.clamp(min=1)


def px_iou_curve(inside: Tensor, outside: Tensor) -> Tensor:
    """The IoU at each threshold, (..., 1001), float64; NaN where no pixel was in a mask."""
    some = inside.sum(-1, keepdim=True) > 0
    return torch.where(some, _ious(inside, outside), torch.nan)


def px_ap(inside: Tensor, outside: Tensor) -> Tensor:
    """PxAP, (...), float64; NaN where no pixel was in a mask."""
    precision, recall = _precision_and_recall(inside, outside)
    gained = torch.diff(recall, prepend=torch.zeros_like(recall[..., :1]))
    return (precision * gained).sum(-1)


def precision_at(inside: Tensor, outside: Tensor, recalls: Tensor) -> Tensor:
    """Precision at the highest threshold that has each recall, (..., len(recalls)), float64.

    At a recall of 0 it is that of the highest threshold with any recall.
    """
    precision, recall = _precision_and_recall(inside, outside)
    least = recalls.to(recall).clamp(min=1e-9).expand(*recall.shape[:-1], -1).contiguous()
    first = torch.searchsorted(recall.contiguous(), least).clamp(max=recall.shape[-1] - 1)
    return precision.gather(-1, first)


def _precision_and_recall(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """At each threshold, from the highest to the lowest."""
    tp, fp = (counts.flip(-1).cumsum(-1).double() for counts in (inside, outside))
    return tp / (tp + fp).clamp(min=1), tp / tp[..., -1:]
