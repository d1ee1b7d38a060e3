"""The torchmetrics classes over `pointing_game` and `energy_pointing_game`."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_ext._repr import options_repr
from captum_ext.metrics import localization
from captum_ext.metrics._definition import MetricDefinition
from captum_ext.metrics.classes._sums import SummedMetric

__all__ = ["EnergyPointingGame", "PointingGame"]


class MeanOverRegions(SummedMetric):
    """The means of a score of map and region, over all and over the difficult examples."""

    definition: ClassVar[MetricDefinition]
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    total: Tensor
    count: Tensor

    def __init__(self, options: localization.RegionOptions, score: Any, kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.definition.check is not None:
            self.definition.check(**score)
        self.options, self.score = options, score
        shape = (2, options.num_classes or 1)
        # A float32 counts hits to 2**24 only, and its sums of shares are inexact earlier.
        total = torch.zeros(shape, dtype=torch.float64)
        count = torch.zeros(shape, dtype=torch.int64)
        self._add_sums((options, score), total=total, count=count)

    def __repr__(self) -> str:
        return options_repr(self, **vars(self.options), **self.score)

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
            masks: (B, H, W) or (B, 1, H, W), bool. An image with objects of several classes gives
                one example for each class.
            target: (B,), integers: the class of each example; needed if `num_classes` is given.
            difficult: (B,), bool: the difficult examples; None means none. An example of the
                literature's pointing game is difficult if the boxes of the class cover less than a
                quarter of the image and another class is there too.

        Raises:
            ValueError: see the function of the metric; labels that do not fit.
            TypeError: masks that are not bool.
        """
        score = partial(self.definition.function, **self.score)
        self.total, self.count = localization.add_scores(
            self.total, self.count, score, attributions, masks, target, difficult, self.options
        )

    def compute(self) -> dict[str, Tensor]:
        """The means by name, "all" and "difficult"; NaN without an example."""
        return localization.mean_scores(self.total, self.count, self.options)


class PointingGame(MeanOverRegions):
    """The accuracy of `pointing_game`: hits / (hits + misses).

    `compute` returns the accuracy over all examples as "all", and over the difficult examples as
    "difficult".

    Args:
        tolerance: in pixels; see `pointing_game`. 15 (authors).
        num_classes: the number of classes in `target`; "macro" and "none" need it.
        average: "micro" takes the mean over the examples; "macro" the mean over the classes that
            occur of the means of their examples, as the literature does for VOC and COCO; "none"
            gives the mean for each class.
        ignore_empty: whether to leave out examples with an empty mask; else they are an error.
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range; see `pointing_game` for the errors of `update`.

    Example:
        >>> game = PointingGame(tolerance=0)
        >>> attributions = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]]])
        >>> masks = torch.tensor([[[True, False]], [[True, True]], [[False, True]]])
        >>> game(attributions, masks, difficult=torch.tensor([False, True, True]))
        {'all': tensor(0.6667), 'difficult': tensor(0.5000)}
    """

    definition = localization.POINTING_GAME

    def __init__(
        self,
        tolerance: float = 15,
        num_classes: int | None = None,
        average: str = "micro",
        ignore_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        options = localization.RegionOptions(num_classes, average, ignore_empty)
        super().__init__(options, {"tolerance": tolerance}, kwargs)


class EnergyPointingGame(MeanOverRegions):
    """The mean of `energy_pointing_game`: the share of positive mass in the region.

    `compute` returns the mean over all examples as "all", and over the difficult examples as
    "difficult".

    Args:
        num_classes: the number of classes in `target`; see `PointingGame`, as for the next.
        average: "micro", "macro" or "none".
        ignore_empty: whether to leave out examples with an empty mask; else they are an error.
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range; see `energy_pointing_game` for the errors of `update`.

    Example:
        >>> game = EnergyPointingGame()
        >>> _ = game(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[True, False]]]))
        >>> game.compute()["all"]
        tensor(0.7500)
    """

    definition = localization.ENERGY

    def __init__(
        self,
        num_classes: int | None = None,
        average: str = "micro",
        ignore_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(localization.RegionOptions(num_classes, average, ignore_empty), {}, kwargs)
