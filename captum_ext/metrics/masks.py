"""Metrics of masks that mark what matters: their overlap with the truth, and how ragged they are.

Nothing is thresholded here: `mask_iou(masks.joint > 0.5, parts)` says itself what it counts.
"""

import torch
from torch import Tensor

from captum_ext._checks import check_choice
from captum_ext.metrics._definition import define
from captum_ext.metrics._inputs import checked_maps, checked_masks

__all__ = ["mask_iou", "total_variation"]

NORMS = ("squared", "absolute")


def mask_iou(predicted: Tensor, true: Tensor) -> Tensor:
    """The intersection of two masks over their union, in pixels, for each image: (B,), in [0, 1].

    |predicted and true| / |predicted or true|; 0 where both masks are empty. The mean over images
    is the figure of Korsch et al., "Simplified Concrete Dropout", 2023, section 4.1, whose
    predicted mask is a map > 0.5.

    Args:
        predicted: (B, H, W) or (B, 1, H, W), bool.
        true: likewise.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: masks that are not bool.

    Example:
        >>> maps = torch.tensor([[[0.9, 0.6, 0.5]]])
        >>> true = torch.tensor([[[False, True, True]]])
        >>> mask_iou(maps > 0.5, true)
        tensor([0.3333])
    """
    predicted, true = checked_masks(predicted, "predicted"), checked_masks(true, "true")
    if predicted.shape != true.shape:
        raise ValueError(
            f"`predicted` {tuple(predicted.shape)} and `true` {tuple(true.shape)} must agree in "
            f"their number and in height and width."
        )
    both = (predicted & true).flatten(1).sum(1)
    either = (predicted | true).flatten(1).sum(1)
    return both / either.clamp(min=1)


def total_variation(maps: Tensor, norm: str = "squared") -> Tensor:
    """How much each map changes from pixel to pixel: (B,).

    sum_yx (m[y+1, x] - m[y, x])^2 + (m[y, x+1] - m[y, x])^2, each pair of neighbours once (Korsch
    et al., "Simplified Concrete Dropout", 2023, Eq. 10), or the absolute differences. It is a plain
    sum: it grows with the map, so that figures of maps of different sizes do not compare.

    Args:
        maps: (B, C, H, W) or (B, H, W). Channels that are all equal count as one map, others are
            summed.
        norm: "squared", or "absolute" as in `kornia.losses` and torchmetrics.

    Raises:
        ValueError: another shape, values that are not finite, an unknown norm.

    Example:
        >>> maps = torch.tensor([[[0.0, 3.0], [0.0, 1.0]]])
        >>> total_variation(maps), total_variation(maps, "absolute")
        (tensor([14.]), tensor([6.]))
    """
    _check_norm(norm)
    values = checked_maps(maps, "maps")
    steps = torch.cat((values.diff(dim=1).flatten(1), values.diff(dim=2).flatten(1)), 1)
    return (steps.square() if norm == "squared" else steps.abs()).sum(1)


def _check_norm(norm: str) -> None:
    check_choice("norm", norm, NORMS)


TOTAL_VARIATION = define(
    "total_variation", total_variation, "map", higher_is_better=False, check=_check_norm
)
