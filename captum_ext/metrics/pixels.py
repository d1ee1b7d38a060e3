"""Pixels of maps against pixels of masks at all thresholds, for PxAP and PxIoU."""

import torch
from torch import Tensor

from captum_ext.metrics._inputs import checked_masks, checked_unit_maps

__all__ = ["pixel_counts", "pixel_iou"]

N_STEPS = 1000


def pixel_counts(
    maps: Tensor, masks: Tensor, ignored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Histograms of the pixels inside the masks and outside of them: two (B, 1001), int64.

    Bin l counts the pixels of value v with

    .. math:: \frac{l}{1000} \le v < \frac{l + 1}{1000},

    and bin 1000 those of value 1. The sums of the bins from l on are the true and the false
    positives at the threshold l / 1000. `PxAP` and `PxIoU` need nothing else of an image (Choe et
    al., "Evaluating Weakly Supervised Object Localization Methods Right", 2020).

    Args:
        maps: (B, H, W) or (B, C, H, W), in [0, 1]. Channels that are all equal count as one map,
            others are summed.
        masks: (B, H, W) or (B, 1, H, W), bool: the object's pixels.
        ignored: of the same shape, bool: pixels that do not count. None ignores none.

    Raises:
        ValueError: shapes that do not fit, maps that are not finite or not in [0, 1].
        TypeError: masks that are not bool.

    Reference:
        Choe et al., https://arxiv.org/abs/2001.07437

    Example:
        >>> maps = torch.tensor([[[0.0, 0.5], [0.5004, 1.0]]])
        >>> masks = torch.tensor([[[False, True], [True, False]]])
        >>> [counts[0, [0, 500, 1000]].tolist() for counts in pixel_counts(maps, masks)]
        [[0, 2, 0], [1, 0, 1]]
    """
    values, masks = checked_unit_maps(maps), checked_masks(masks)
    is_counted = torch.ones_like(masks) if ignored is None else ~checked_masks(ignored, "ignored")
    if values.shape != masks.shape or is_counted.shape != masks.shape:
        raise ValueError(
            f"`maps` {tuple(values.shape)}, `masks` {tuple(masks.shape)} and `ignored` must agree."
        )
    # On the CPU, since a GPU multiplies by 1 / 1000, which puts half of the edges off by a bit.
    steps = torch.arange(N_STEPS + 1, dtype=values.dtype, device="cpu")
    edges = (steps / N_STEPS).to(values.device)
    n, n_bins = len(values), N_STEPS + 1
    row = 2 * torch.arange(n, device=values.device)[:, None, None] + (~masks).long()
    bins = row * n_bins + torch.bucketize(values.contiguous(), edges, right=True) - 1
    counts = torch.bincount(bins[is_counted], minlength=2 * n * n_bins).view(n, 2, n_bins)
    return counts[:, 0], counts[:, 1]


def pixel_iou(maps: Tensor, masks: Tensor, ignored: Tensor | None = None) -> Tensor:
    r"""The IoU of each mask and the pixels at or above each threshold: (B, 1001), float32.

    Of a map m and the pixels M of the mask, at the threshold :math:`\tau`,

    .. math:: \operatorname{IoU}(\tau)
        = \frac{|\{m \ge \tau\} \cap M|}{|\{m \ge \tau\} \cup M|}

    Thresholds are 0, 0.001, ..., 1, and not relative to a map's maximum. Ignored pixels are in no
    union. The IoU of an empty union is 0, as for `mask_iou`.

    Args:
        maps: (B, H, W) or (B, C, H, W), in [0, 1]; see `pixel_counts`.
        masks: (B, H, W) or (B, 1, H, W), bool: the object's pixels.
        ignored: of the same shape, bool: pixels that do not count. None ignores none.

    Raises:
        ValueError: shapes that do not fit, maps that are not finite or not in [0, 1].
        TypeError: masks that are not bool.

    Example:
        >>> maps = torch.tensor([[[0.9, 0.6, 0.5]]])
        >>> masks = torch.tensor([[[False, True, True]]])
        >>> pixel_iou(maps, masks)[0, [0, 550, 1000]]
        tensor([0.6667, 0.3333, 0.0000])
    """
    return _threshold_ious(*pixel_counts(maps, masks, ignored)).float()


# --- functions of two counts (..., 1001), of one image or summed over images ---------------------


def _threshold_ious(inside: Tensor, outside: Tensor) -> Tensor:
    """The IoU at each threshold, (..., 1001), float64."""
    tp, fp = (counts.flip(-1).cumsum(-1).flip(-1) for counts in (inside, outside))
    union = inside.sum(-1, keepdim=True) + fp  # TP + FN + FP
    return tp.double() / union.clamp(min=1)


def px_iou_curve(inside: Tensor, outside: Tensor) -> Tensor:
    """The IoU at each threshold, (..., 1001), float64; NaN where no pixel was in a mask."""
    has_object = inside.sum(-1, keepdim=True) > 0
    return torch.where(has_object, _threshold_ious(inside, outside), torch.nan)


def px_ap(inside: Tensor, outside: Tensor) -> Tensor:
    """PxAP, (...), float64; NaN where no pixel was in a mask."""
    precision, recall = _precision_and_recall(inside, outside)
    gained = torch.diff(recall, prepend=torch.zeros_like(recall[..., :1]))
    return (precision * gained).sum(-1)


def precision_at(inside: Tensor, outside: Tensor, recalls: Tensor) -> Tensor:
    """Precision at the highest threshold that reaches each recall, (..., len(recalls)), float64.

    For a recall of 0 it is the precision at the highest threshold with a recall above 0.
    """
    precision, recall = _precision_and_recall(inside, outside)
    least = recalls.to(recall).clamp(min=1e-9).expand(*recall.shape[:-1], -1).contiguous()
    first = torch.searchsorted(recall.contiguous(), least).clamp(max=recall.shape[-1] - 1)
    return precision.gather(-1, first)


def _precision_and_recall(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall (..., 1001), from the highest threshold to the lowest."""
    tp, fp = (counts.flip(-1).cumsum(-1).double() for counts in (inside, outside))
    return tp / (tp + fp).clamp(min=1), tp / tp[..., -1:]
