"""Pixels of maps against pixels of masks, at all thresholds at once."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_ext.metrics._inputs import checked_masks, checked_unit_maps

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


def _ious(inside: Tensor, outside: Tensor) -> Tensor:
    """At each threshold, of counts (..., 1001)."""
    tp, fp = (counts.flip(-1).cumsum(-1).flip(-1) for counts in (inside, outside))
    union = inside.sum(-1, keepdim=True) + fp  # what is found or missed, and what is found wrongly
    return tp.double() / union.clamp(min=1)


class PixelCounts(Metric):
    """The `pixel_counts` of all images together, of which `PxAP` and `PxIoU` are functions."""

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
            zeros = torch.zeros(N_STEPS + 1, dtype=torch.int64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, maps: Tensor, masks: Tensor, ignored: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            maps: (B, H, W) or (B, C, H, W), in [0, 1].
            masks: (B, H, W) or (B, 1, H, W), bool: the object's pixels; some may be empty.
            ignored: of the same shape, bool: pixels that do not count. None ignores none.

        Raises:
            ValueError: shapes that do not fit, maps that are not finite or not in [0, 1].
            TypeError: masks that are not bool.
        """
        inside, outside = pixel_counts(maps, masks, ignored)
        self.inside = self.inside + inside.sum(0).to(self.inside.device)
        self.outside = self.outside + outside.sum(0).to(self.outside.device)


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


class PxIoU(PixelCounts):
    r"""The IoU of the pixels of all images together, at the threshold that is best for all of them.

    .. math:: \operatorname{PxIoU} = \max_\tau \frac{\mathrm{TP}(\tau)}
        {\mathrm{TP}(\tau) + \mathrm{FP}(\tau) + \mathrm{FN}(\tau)}

    with the pixels at or above a threshold of 0, 0.001, ..., 1, pooled as by `PxAP`: a large object
    counts for more than a small one. One threshold serves all images and is chosen with the masks
    in hand, so that this is an upper bound. A map that is constant has the share of the object's
    pixels. The mean over images is that of `pixel_iou`.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: see `pixel_counts` for those of `update`.

    Example:
        >>> metric = PxIoU()
        >>> maps = torch.tensor([[[0.9, 0.4], [0.4, 0.1]]])
        >>> metric(maps, torch.tensor([[[True, True], [False, False]]]))
        tensor(0.6667)
        >>> metric.threshold()
        tensor(0.1010)
    """

    def compute(self) -> Tensor:
        """In [0, 1]; NaN where no pixel was in a mask."""
        return self.curve().amax()

    def curve(self) -> Tensor:
        """The IoU at each threshold, (1001,); NaN where no pixel was in a mask."""
        found = _ious(self.inside, self.outside).float()
        return torch.where(self.inside.sum() > 0, found, torch.nan)

    def threshold(self) -> Tensor:
        """The best threshold, the smallest of them; NaN where no pixel was in a mask."""
        curve = self.curve()
        return torch.where(curve[0].isnan(), torch.nan, curve.argmax() / N_STEPS)
