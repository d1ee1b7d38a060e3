"""The torchmetrics classes over `pixel_counts`: PxAP and PxIoU."""

from typing import Any

import torch
from torch import Tensor

from captum_ext.metrics import pixels
from captum_ext.metrics.classes._sums import SummedMetric

__all__ = ["PxAP", "PxIoU"]


class SummedPixelCounts(SummedMetric):
    """The sums of `pixel_counts` over images; `PxAP` and `PxIoU` are functions of them."""

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    inside: Tensor
    outside: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zeros = torch.zeros(pixels.N_STEPS + 1, dtype=torch.int64)
        self._add_sums(inside=zeros, outside=zeros.clone())

    @classmethod
    def _class_of_update(cls) -> type:
        """The class that defines `update`, so that PxAP and PxIoU share their sums."""
        return next(base for base in cls.__mro__ if "update" in vars(base))

    def update(self, maps: Tensor, masks: Tensor, ignored: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            maps: (B, H, W) or (B, C, H, W), in [0, 1].
            masks: (B, H, W) or (B, 1, H, W), bool: the object's pixels. Masks may be empty.
            ignored: of the same shape, bool: pixels that do not count. None ignores none.

        Raises:
            ValueError: shapes that do not fit, maps that are not finite or not in [0, 1].
            TypeError: masks that are not bool.
        """
        inside, outside = pixels.pixel_counts(maps, masks, ignored)
        self.inside = self.inside + inside.sum(0).to(self.inside.device)
        self.outside = self.outside + outside.sum(0).to(self.outside.device)


class PxAP(SummedPixelCounts):
    r"""The average precision of the pixels of all images together.

    .. math:: \operatorname{PxAP} = \sum_l \operatorname{Prec}(\tau_l)
        (\operatorname{Rec}(\tau_l) - \operatorname{Rec}(\tau_{l+1}))

    with the precision and recall of all pixels at or above a threshold (Choe et al., "Evaluating
    Weakly Supervised Object Localization Methods Right", 2020). Thresholds are 0, 0.001, ..., 1,
    and not relative to a map's maximum. Constant maps have the share of the object's pixels.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: see `pixel_counts` for the errors of `update`.

    Reference:
        Choe et al., https://arxiv.org/abs/2001.07437

    Example:
        >>> metric = PxAP()
        >>> maps = torch.tensor([[[0.9, 0.4], [0.4, 0.1]]])
        >>> metric(maps, torch.tensor([[[True, True], [False, False]]]))
        tensor(0.8333)
    """

    def compute(self) -> Tensor:
        """PxAP, in [0, 1]; NaN if no pixel was in a mask."""
        return pixels.px_ap(self.inside, self.outside).float()


class PxIoU(SummedPixelCounts):
    r"""The IoU of the pixels of all images together, at the best common threshold.

    .. math:: \operatorname{PxIoU} = \max_\tau \frac{\mathrm{TP}(\tau)}
        {\mathrm{TP}(\tau) + \mathrm{FP}(\tau) + \mathrm{FN}(\tau)}

    with the pixels at or above a threshold of 0, 0.001, ..., 1. The pixels of all images are
    counted together, as by `PxAP`: a large object counts for more than a small one. One threshold
    serves all images and is chosen by the true masks, so that PxIoU is an upper bound. Constant
    maps have the share of the object's pixels. `pixel_iou` gives the IoUs of each image.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: see `pixel_counts` for the errors of `update`.

    Example:
        >>> metric = PxIoU()
        >>> maps = torch.tensor([[[0.9, 0.4], [0.4, 0.1]]])
        >>> metric(maps, torch.tensor([[[True, True], [False, False]]]))
        tensor(0.6667)
        >>> metric.threshold()
        tensor(0.1010)
    """

    def compute(self) -> Tensor:
        """PxIoU, in [0, 1]; NaN if no pixel was in a mask."""
        return self.curve().amax()

    def curve(self) -> Tensor:
        """The IoU at each threshold, (1001,); NaN if no pixel was in a mask."""
        return pixels.px_iou_curve(self.inside, self.outside).float()

    def threshold(self) -> Tensor:
        """The smallest of the best thresholds; NaN if no pixel was in a mask."""
        curve = self.curve()
        return torch.where(curve[0].isnan(), torch.nan, curve.argmax().float() / pixels.N_STEPS)
