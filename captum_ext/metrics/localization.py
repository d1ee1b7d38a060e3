"""Does an attribution lie on the object? The pointing game, by point and by mass.

Attributions are (B, C, H, W) or (B, H, W). Channels that are all equal count as one map, others are
summed. Regions are masks, (B, H, W) or (B, 1, H, W), bool; `boxes_to_masks` makes them from boxes.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_ext.metrics._inputs import checked_maps, checked_masks

AVERAGES = ("micro", "macro", "none")


# --- functions -----------------------------------------------------------------------------------


def pointing_game(attributions: Tensor, masks: Tensor, tolerance: float = 15) -> Tensor:
    """Whether the largest value of each map is on the object, or nearly: (B,), bool.

    A hit is a pixel of the mask at a distance of less than `tolerance` from the map's maximum
    (Zhang et al., "Top-down Neural Attention by Excitation Backprop", 2016; so counted by
    TorchRay). Of several maxima the first in row-major order is taken. A flat map, which points
    nowhere, is a miss.

    Args:
        attributions: (B, C, H, W) or (B, H, W), of any scale and sign.
        masks: (B, H, W) or (B, 1, H, W), bool, none of them empty.
        tolerance: in pixels; 15 is the authors'. At 0 the maximum must be in the mask.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, an empty mask, a negative
            tolerance.
        TypeError: masks that are not bool.

    Example:
        >>> from captum_ext.metrics import boxes_to_masks
        >>> attributions = torch.zeros(1, 1, 8, 8)
        >>> attributions[0, 0, 2, 6] = 1
        >>> masks = boxes_to_masks([torch.tensor([[0, 0, 4, 4]])], (8, 8))
        >>> pointing_game(attributions, masks, tolerance=3)  # the mask's (2, 3) is 3 away
        tensor([False])
        >>> pointing_game(attributions, masks, tolerance=4)
        tensor([True])
    """
    _check_tolerance(tolerance)
    maps, masks = _maps_and_masks(attributions, masks)
    flat = maps.flatten(1)
    width = maps.shape[2]
    first = flat.argmax(1)[:, None, None]
    rows = torch.arange(maps.shape[1], device=maps.device)[:, None] - first // width
    columns = torch.arange(width, device=maps.device) - first % width
    # Below 1 there is only the maximum itself.
    near = rows**2 + columns**2 < max(tolerance**2, 1)
    hits: Tensor = (near & masks).flatten(1).any(1) & (flat.amax(1) > flat.amin(1))
    return hits


def energy_pointing_game(attributions: Tensor, masks: Tensor) -> Tensor:
    """The share of each map's positive mass that lies in the region: (B,), in [0, 1].

    sum_p [p in mask] max(a_p, 0) / sum_p max(a_p, 0) (Wang et al., "Score-CAM", 2020, who take the
    object's box). A map without a positive value has 0. Expected of a constant positive map is the
    region's share of the area.

    Args:
        attributions: (B, C, H, W) or (B, H, W).
        masks: (B, H, W) or (B, 1, H, W), bool, none of them empty.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, an empty mask.
        TypeError: masks that are not bool.

    Example:
        >>> attributions = torch.tensor([[[3.0, 1.0], [-5.0, 0.0]]])
        >>> masks = torch.tensor([[[True, False], [True, True]]])
        >>> energy_pointing_game(attributions, masks)
        tensor([0.7500])
    """
    maps, masks = _maps_and_masks(attributions, masks)
    # Divided by its maximum first, a map of any scale has a sum that is finite and no subnormal.
    positive = maps.flatten(1).clamp(min=0)
    largest = positive.amax(1, keepdim=True)
    positive = positive / torch.where(largest > 0, largest, 1)
    inside = (positive * masks.flatten(1)).sum(1)
    return inside / positive.sum(1).clamp(min=1)


def _maps_and_masks(attributions: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (B, H, W), the maps in float32 or better."""
    masks = checked_masks(masks)
    maps = checked_maps(attributions)
    if maps.shape != masks.shape:
        raise ValueError(
            f"`attributions` {tuple(attributions.shape)} and `masks` {tuple(masks.shape)} must "
            f"agree in their number and in height and width."
        )
    filled = masks.flatten(1).any(1)
    if not bool(filled.all()):
        empty = (~filled).nonzero().flatten().tolist()
        shown = str(empty) if len(empty) <= 8 else f"{empty[:8]} and {len(empty) - 8} more"
        raise ValueError(f"`masks` {shown} are empty: there is nothing to point at.")
    return maps, masks


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"`tolerance` must be a number of pixels, 0 or more, got {tolerance}.")


# --- torchmetrics --------------------------------------------------------------------------------


class _RegionScore(Metric):
    """The mean of a score of map and region, over all examples and over the difficult ones."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    total: Tensor
    count: Tensor

    def __init__(
        self,
        num_classes: int | None = None,
        average: str = "micro",
        ignore_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if average not in AVERAGES:
            raise ValueError(f"`average` must be one of {AVERAGES}, got {average!r}.")
        if num_classes is None and average != "micro":
            raise ValueError(f'`num_classes` must be given with average="{average}".')
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"`num_classes` must be positive, got {num_classes}.")
        self.num_classes, self.average, self.ignore_empty = num_classes, average, ignore_empty
        cells = (2, num_classes or 1)  # all and difficult, by class
        # A float32 that counts hits stays at 2**24, and one that sums shares is off before.
        self.add_state("total", torch.zeros(cells, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(cells, dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def _score(self, attributions: Tensor, masks: Tensor) -> Tensor:
        """Of each example, (B,)."""

    def update(
        self,
        attributions: Tensor,
        masks: Tensor,
        target: Tensor | None = None,
        difficult: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            attributions: (B, C, H, W) or (B, H, W).
            masks: (B, H, W) or (B, 1, H, W), bool. An image with objects of several classes is as
                many examples.
            target: (B,), integers: the class of each; needed if `num_classes` is given.
            difficult: (B,), bool: which examples the second figure is about; None is none. In the
                pointing game of the literature, those where the boxes of the class cover less than
                a quarter of the image and another class is there too.
        """
        n = len(attributions)
        target, difficult = self._labels(n, target, difficult, attributions.device)
        if self.ignore_empty:
            kept = checked_masks(masks).flatten(1).any(1)
            if len(kept) != n:
                raise ValueError(f"`masks` must be {n}, one for each example, got {len(kept)}.")
            attributions, masks = attributions[kept], masks[kept]
            target, difficult = target[kept], difficult[kept]
        scores = self._score(attributions, masks).to(self.total)
        chosen = torch.stack((torch.ones_like(difficult), difficult)).to(scores.device)
        target = target.to(scores.device)
        self.total = self.total.index_add(1, target, scores * chosen)
        self.count = self.count.index_add(1, target, chosen.long())

    def compute(self) -> dict[str, Tensor]:
        """{"all": ..., "difficult": ...}; NaN where there was no example."""
        total, count = self.total, self.count
        if self.average == "micro":
            total, count = total.sum(1), count.sum(1)
        shares = torch.where(count > 0, total / count, torch.nan).float()
        if self.average == "macro":
            shares = shares.nanmean(1)
        return {"all": shares[0], "difficult": shares[1]}

    def _labels(
        self, n: int, target: Tensor | None, difficult: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        if difficult is None:
            difficult = torch.zeros(n, dtype=torch.bool, device=device)
        if difficult.dtype != torch.bool or difficult.shape != (n,):
            raise ValueError(
                f"`difficult` must be bool, ({n},), got {difficult.dtype}, "
                f"{tuple(difficult.shape)}."
            )
        difficult = difficult.to(device)
        if self.num_classes is None:
            return torch.zeros(n, dtype=torch.int64, device=device), difficult
        if target is None or target.shape != (n,) or target.is_floating_point():
            got = None if target is None else (target.dtype, tuple(target.shape))
            raise ValueError(f"`target` must be integers, ({n},), got {got}.")
        if bool(((target < 0) | (target >= self.num_classes)).any()):
            raise ValueError(f"`target` must be in [0, {self.num_classes}), the `num_classes`.")
        return target.long().to(device), difficult


class PointingGame(_RegionScore):
    """The accuracy of `pointing_game`: hits / (hits + misses).

    `compute` gives it over all examples and over those marked as difficult, by the names "all" and
    "difficult".

    Args:
        tolerance: see `pointing_game`.
        num_classes: how many classes `target` has; needed by "macro" and "none".
        average: "micro", over the examples; "macro", over the classes that occur, each with the
            mean of its examples, as the figures for VOC and COCO are in the literature; "none", of
            each class.
        ignore_empty: whether examples with an empty mask are left out; else they raise.
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range; see `pointing_game` for those of `update`.

    Example:
        >>> game = PointingGame(tolerance=0)
        >>> attributions = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]]])
        >>> masks = torch.tensor([[[True, False]], [[True, True]], [[False, True]]])
        >>> game(attributions, masks, difficult=torch.tensor([False, True, True]))
        {'all': tensor(0.6667), 'difficult': tensor(0.5000)}
    """

    def __init__(
        self,
        tolerance: float = 15,
        num_classes: int | None = None,
        average: str = "micro",
        ignore_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, average, ignore_empty, **kwargs)
        _check_tolerance(tolerance)
        self.tolerance = tolerance

    def _score(self, attributions: Tensor, masks: Tensor) -> Tensor:
        return pointing_game(attributions, masks, self.tolerance)


class EnergyPointingGame(_RegionScore):
    """The mean of `energy_pointing_game`: the share of positive mass in the region.

    `compute` gives it over all examples and over those marked as difficult, by the names "all" and
    "difficult".

    Args:
        num_classes: see `PointingGame`, as for the rest.
        average: "micro", "macro" or "none".
        ignore_empty: whether examples with an empty mask are left out; else they raise.
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range; see `energy_pointing_game` for those of `update`.

    Example:
        >>> game = EnergyPointingGame()
        >>> _ = game(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[True, False]]]))
        >>> game.compute()["all"]
        tensor(0.7500)
    """

    def _score(self, attributions: Tensor, masks: Tensor) -> Tensor:
        return energy_pointing_game(attributions, masks)
