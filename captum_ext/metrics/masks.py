"""Metrics of masks: their overlap with true masks, and the total variation of soft masks.

Masks are thresholded by the caller, as in `mask_iou(masks.joint > 0.5, parts)`.
"""

import torch
from torch import Tensor

from captum_ext._checks import check_choice
from captum_ext._engine.precision import divide_by_power
from captum_ext.metrics._definition import MetricDefinition
from captum_ext.metrics._inputs import checked_maps, checked_masks

__all__ = ["mask_iou", "total_variation"]

NORMS = ("squared", "absolute")


def mask_iou(predicted: Tensor, true: Tensor) -> Tensor:
    r"""The intersection of two masks over their union, in pixels, for each image: (B,), in [0, 1].

    Of the pixels P of the predicted mask and T of the true one,

    .. math:: \operatorname{IoU} = |P \cap T| / |P \cup T|,

    and 0 where both masks are empty. The mean over images is the figure of Korsch et al.,
    "Simplified Concrete Dropout", 2023, section 4.1, whose predicted mask is a map > 0.5.

    Args:
        predicted: (B, H, W) or (B, 1, H, W), bool.
        true: (B, H, W) or (B, 1, H, W), bool.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: masks that are not bool.

    Reference:
        Korsch et al., https://arxiv.org/abs/2307.14825

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
    intersection = (predicted & true).flatten(1).sum(1)
    union = (predicted | true).flatten(1).sum(1)
    return intersection.float() / union.clamp(min=1)


def total_variation(maps: Tensor, norm: str = "squared") -> Tensor:
    r"""The total variation of each map, from pixel to pixel: (B,).

    .. math:: \sum_{y, x} (m_{y+1, x} - m_{y, x})^2 + (m_{y, x+1} - m_{y, x})^2

    takes each pair of neighbours once (Korsch et al., "Simplified Concrete Dropout", 2023, Eq. 10).
    "absolute" sums the absolute differences instead. The sum grows with the size of the map, so
    that maps of different sizes do not compare.

    Args:
        maps: (B, C, H, W) or (B, H, W). Channels that are all equal count as one map, others are
            summed.
        norm: "squared" (paper), or "absolute" as in `kornia.losses` and torchmetrics.

    Raises:
        ValueError: another shape, values that are not finite, an unknown norm.
        TypeError: maps that are no tensor.

    Reference:
        Korsch et al., https://arxiv.org/abs/2307.14825

    Example:
        >>> maps = torch.tensor([[[0.0, 3.0], [0.0, 1.0]]])
        >>> total_variation(maps), total_variation(maps, "absolute")
        (tensor([14.]), tensor([6.]))
    """
    _check_norm(norm)
    values = checked_maps(maps, "maps")
    steps = torch.cat((values.diff(dim=1).flatten(1), values.diff(dim=2).flatten(1)), 1)
    if norm == "absolute" or not steps.shape[1]:
        return steps.abs().sum(1)
    divided, power = divide_by_power(steps)
    return divided.square().sum(1) * power[:, 0] * power[:, 0]


def _check_norm(norm: str) -> None:
    check_choice("norm", norm, NORMS)


TOTAL_VARIATION = MetricDefinition(
    "total_variation", total_variation, "map", higher_is_better=False, check=_check_norm
)
