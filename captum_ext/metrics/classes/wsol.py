"""The torchmetrics class over `box_ious`: MaxBoxAcc."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_ext._repr import options_repr
from captum_ext.metrics import wsol
from captum_ext.metrics._regions import N_THRESHOLDS
from captum_ext.metrics.classes._sums import SummedMetric

__all__ = ["MaxBoxAcc"]


class MaxBoxAcc(SummedMetric):
    r"""The share of images whose object has a good box, at the best common threshold.

    .. math:: \operatorname{MaxBoxAcc}(\delta)
        = \max_\tau \frac1N \sum_n [\operatorname{IoU}_n(\tau) \ge \delta]

    with the IoUs of `box_ious` (Choe et al., "Evaluating Weakly Supervised Object Localization
    Methods Right", 2020). One threshold :math:`\tau` serves all N images and is chosen by the true
    boxes, so that MaxBoxAcc is an upper bound by design. ``iou_thresholds=(0.3, 0.5, 0.7),
    contours="all"`` is MaxBoxAccV2, the mean over the three :math:`\delta`, each with its own best
    :math:`\tau`. Published figures follow ``convention="wsolevaluation"``. V2 does not punish false
    regions elsewhere in the picture: show `PxAP` beside it.

    Args:
        iou_thresholds: :math:`\delta`, the least IoU of a hit. 0.5 (paper).
        contours: "largest" (paper) or "all"; see `box_ious`.
        convention: "components" or "wsolevaluation"; see `box_ious`.
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range; see `box_ious` for the errors of `update`.

    Reference:
        Choe et al., https://arxiv.org/abs/2001.07437

    Example:
        >>> metric = MaxBoxAcc(iou_thresholds=(0.3, 0.5, 0.7), contours="all")
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2:5, 2:6] = 1
        >>> metric(maps, [torch.tensor([[2, 2, 6, 4]])])
        tensor(0.6667)
    """

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
        self.options = wsol.BoxOptions(iou_thresholds, contours, convention)
        shape = (len(self.options.iou_thresholds), N_THRESHOLDS)
        count = torch.zeros((), dtype=torch.int64)
        self._add_sums(self.options, hits=torch.zeros(shape, dtype=torch.int64), count=count)

    def __repr__(self) -> str:
        return options_repr(self, **vars(self.options))

    def update(self, maps: Tensor, boxes: Sequence[Tensor], counted: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            maps: (B, H, W) or (B, C, H, W), in [0, 1]; see `box_ious`.
            boxes: for each image (n, 4).
            counted: (B,), bool: the other images are never hits. None counts all. With the images
                whose label is among the classifier's k largest logits (`in_top_k`), the metric is
                top-k localisation.

        Raises:
            ValueError: see `box_ious`; `counted` of another shape or type.
        """
        ious = wsol.box_ious(maps, boxes, self.options.contours, self.options.convention)
        hits = wsol.box_hits(ious, self.options, counted)
        self.hits = self.hits + hits.sum(0).to(self.hits.device)
        self.count = self.count + len(ious)

    def compute(self) -> Tensor:
        """MaxBoxAcc, in [0, 1]; NaN without an image."""
        return wsol.max_box_acc(self.hits, self.count)

    def curves(self) -> Tensor:
        """BoxAcc at each IoU and threshold: (len(iou_thresholds), 1000)."""
        return wsol.box_acc(self.hits, self.count)
