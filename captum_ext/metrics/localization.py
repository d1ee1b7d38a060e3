"""The pointing game, by the map's maximum and by its mass: does a map lie on the object?

Attributions are (B, C, H, W) or (B, H, W). Channels that are all equal count as one map, others are
summed. Regions are masks, (B, H, W) or (B, 1, H, W), bool; `boxes_to_masks` makes them from boxes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_ext._checks import check_choice, check_non_negative
from captum_ext._errors import ArgumentError
from captum_ext.metrics._definition import MetricDefinition
from captum_ext.metrics._inputs import checked_maps, checked_masks

__all__ = ["energy_pointing_game", "pointing_game"]

AVERAGES = ("micro", "macro", "none")


# --- figures of each example ---------------------------------------------------------------------


def pointing_game(attributions: Tensor, masks: Tensor, tolerance: float = 15) -> Tensor:
    r"""True for each map whose maximum is on the object or near it: (B,), bool.

    With p the pixel of the map's maximum, a map is a hit if a pixel q of the mask is nearer than
    the tolerance t,

    .. math:: \min_q \lVert p - q \rVert < t,

    as TorchRay counts hits (Zhang et al., "Top-down Neural Attention by Excitation Backprop",
    2016). The first of several maxima in row-major order is taken. A flat map points nowhere and is
    a miss.

    Args:
        attributions: (B, C, H, W) or (B, H, W), of any scale and sign.
        masks: (B, H, W) or (B, 1, H, W), bool, none of them empty.
        tolerance: in pixels. 15 (authors). At 0 the maximum must be in the mask.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, an empty mask, a negative
            tolerance.
        TypeError: masks that are not bool.

    Reference:
        Zhang et al., https://arxiv.org/abs/1608.00507

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
    # Nearer than 1 is only the maximum itself.
    near = rows**2 + columns**2 < max(tolerance * tolerance, 1)
    hits: Tensor = (near & masks).flatten(1).any(1) & (flat.amax(1) > flat.amin(1))
    return hits


def energy_pointing_game(attributions: Tensor, masks: Tensor) -> Tensor:
    r"""The share of each map's positive mass that lies in the region: (B,), in [0, 1].

    Of a map a and the pixels M of the mask,

    .. math:: \frac{\sum_{p \in M} \max(a_p, 0)}{\sum_p \max(a_p, 0)}

    (Wang et al., "Score-CAM", 2020, whose region is the object's box). A map without a positive
    value has 0. A constant positive map has the region's share of the area.

    Args:
        attributions: (B, C, H, W) or (B, H, W).
        masks: (B, H, W) or (B, 1, H, W), bool, none of them empty.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, an empty mask.
        TypeError: masks that are not bool.

    Reference:
        Wang et al., https://arxiv.org/abs/1910.01279

    Example:
        >>> attributions = torch.tensor([[[3.0, 1.0], [-5.0, 0.0]]])
        >>> masks = torch.tensor([[[True, False], [True, True]]])
        >>> energy_pointing_game(attributions, masks)
        tensor([0.7500])
    """
    maps, masks = _maps_and_masks(attributions, masks)
    # Dividing by the maximum first keeps the sum of a map of any scale finite and not subnormal.
    positive = maps.flatten(1).clamp(min=0)
    largest = positive.amax(1, keepdim=True)
    positive = positive / torch.where(largest > 0, largest, 1)
    inside = (positive * masks.flatten(1)).sum(1)
    return inside / positive.sum(1).clamp(min=1)


def _maps_and_masks(attributions: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Maps and masks (B, H, W), the maps in float32 or better."""
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
        listed = str(empty) if len(empty) <= 8 else f"{empty[:8]} and {len(empty) - 8} more"
        raise ValueError(f"`masks` {listed} are empty: there is nothing to point at.")
    return maps, masks


def _check_tolerance(tolerance: float) -> None:
    check_non_negative("tolerance", tolerance)


POINTING_GAME = MetricDefinition(
    "pointing_game", pointing_game, "region", "PointingGame", check=_check_tolerance
)
ENERGY = MetricDefinition("energy", energy_pointing_game, "region", "EnergyPointingGame")


# --- means over examples -------------------------------------------------------------------------


@dataclass(frozen=True)
class RegionOptions:
    """The options of `PointingGame` for the mean over examples."""

    num_classes: int | None = None
    average: str = "micro"
    ignore_empty: bool = False

    def __post_init__(self) -> None:
        check_choice("average", self.average, AVERAGES)
        n = self.num_classes
        if n is None and self.average != "micro":
            raise ArgumentError(
                f'`num_classes` must be given with average="{self.average}".', "num_classes"
            )
        if n is not None and (isinstance(n, bool) or not hasattr(n, "__index__") or n < 1):
            raise ArgumentError(
                f"`num_classes` must be an integer of at least 1, got {n!r}.", "num_classes"
            )


def add_scores(
    total: Tensor,
    count: Tensor,
    score: Callable[[Tensor, Tensor], Tensor],
    attributions: Tensor,
    masks: Tensor,
    target: Tensor | None,
    difficult: Tensor | None,
    options: RegionOptions,
) -> tuple[Tensor, Tensor]:
    """Add the scores of a batch to their sums and numbers, by class.

    Args:
        total: (2, classes), float64: the sums over all and over the difficult examples.
        count: (2, classes), int64: the numbers of these examples.
        score: gives the scores (B,) of maps and masks.
        attributions: see `PointingGame.update`, as for the next three.
        masks: the regions.
        target: the class of each example.
        difficult: the difficult examples.
        options: for the mean.

    Returns:
        The new `total` and `count`.
    """
    n = len(attributions)
    target, difficult = _checked_labels(
        n, target, difficult, attributions.device, options.num_classes
    )
    if options.ignore_empty:
        kept = checked_masks(masks).flatten(1).any(1)
        if len(kept) != n:
            raise ValueError(f"`masks` must be {n}, one for each example, got {len(kept)}.")
        attributions, masks = attributions[kept], masks[kept]
        target, difficult = target[kept], difficult[kept]
    scores = score(attributions, masks).to(total)
    included = torch.stack((torch.ones_like(difficult), difficult)).to(scores.device)
    target = target.to(scores.device)
    return (
        total.index_add(1, target, scores * included),
        count.index_add(1, target, included.long()),
    )


def mean_scores(total: Tensor, count: Tensor, options: RegionOptions) -> dict[str, Tensor]:
    """The means over all and over the difficult examples; NaN without an example."""
    if options.average == "micro":
        total, count = total.sum(1), count.sum(1)
    shares = torch.where(count > 0, total / count, torch.nan).float()
    if options.average == "macro":
        shares = shares.nanmean(1)
    return {"all": shares[0], "difficult": shares[1]}


def _checked_labels(
    n: int,
    target: Tensor | None,
    difficult: Tensor | None,
    device: torch.device,
    num_classes: int | None,
) -> tuple[Tensor, Tensor]:
    if difficult is None:
        difficult = torch.zeros(n, dtype=torch.bool, device=device)
    if difficult.dtype != torch.bool or difficult.shape != (n,):
        raise ValueError(
            f"`difficult` must be bool, ({n},), got {difficult.dtype}, {tuple(difficult.shape)}."
        )
    difficult = difficult.to(device)
    if num_classes is None:
        return torch.zeros(n, dtype=torch.int64, device=device), difficult
    if target is None or target.shape != (n,) or target.is_floating_point():
        got = None if target is None else (target.dtype, tuple(target.shape))
        raise ValueError(f"`target` must be integers, ({n},), got {got}.")
    if bool(((target < 0) | (target >= num_classes)).any()):
        raise ValueError(f"`target` must be in [0, {num_classes}), the `num_classes`.")
    return target.long().to(device), difficult
