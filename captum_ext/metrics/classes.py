"""The torchmetrics classes over the functions: sums over batches and processes.

`captum_ext.metrics` imports them, and torchmetrics, where one is asked for.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_ext.metrics import _definition, confidence, curves, localization, pixels, wsol
from captum_ext.metrics.road import ROAD

__all__ = [
    "AverageDrop",
    "Deletion",
    "EnergyPointingGame",
    "IncreaseInConfidence",
    "Insertion",
    "MaxBoxAcc",
    "Overall",
    "PointingGame",
    "PxAP",
    "PxIoU",
    "Road",
]


class SummedMetric(Metric):
    """A metric of sums over images, which add up over batches and processes."""

    is_differentiable = False
    full_state_update = False

    def _add_sums(self, options: Any = "", **zeros: Tensor) -> None:
        """Add states, and say of which options they are.

        `MetricCollection` updates metrics as one where their states agree in name, shape and, after
        the first batch, value. The name of one more state, which is always 0, tells those apart
        that only happen to agree.
        """
        for name, zero in zeros.items():
            self.add_state(name, zero, dist_reduce_fx="sum")
        source = self._source()
        name = f"sums of {source.__module__}.{source.__qualname__} {options}"
        self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @classmethod
    def _source(cls) -> type:
        """The class that says what is summed."""
        return cls


# --- means over images of what a function gives for each -----------------------------------------


class MeanOverImages(SummedMetric):
    """The mean over images of what a function gives for each.

    `update` takes what the function returned for a batch, and raises a TypeError for anything else,
    a ValueError for values that are not finite. `compute` gives the mean, or each by its name, in
    float32; NaN without an image.

    Args:
        **kwargs: see `torchmetrics.Metric`.
    """

    definition: ClassVar[_definition.Definition]
    names: tuple[str, ...] = ()  # of the means, where there are several

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # One float32 more or less is lost in the sum of a million images.
        total = torch.zeros(len(self.names) or 1, dtype=torch.float64)
        self._add_sums(total=total, count=torch.zeros((), dtype=torch.int64))

    def update(self, found: Any) -> None:
        """Add a batch: what the function returned for it."""
        values = self.definition.values(found)
        if not bool(torch.isfinite(values).all()):
            raise ValueError("`found` has values that are not finite.")
        self.total = self.total + values.double().sum(0).to(self.total.device)
        self.count = self.count + len(values)

    def compute(self) -> Any:
        """The mean, or each by its name; NaN without an image."""
        means = (self.total / self.count).float()
        return dict(zip(self.names, means, strict=True)) if self.names else means[0]


class Insertion(MeanOverImages):
    """The mean AUC of `insertion`; see `MeanOverImages`.

    Example:
        >>> from captum_ext.metrics import Curve
        >>> metric = Insertion()
        >>> shares = torch.tensor([0.0, 1.0])
        >>> metric.update(Curve(torch.tensor([0.5, 0.75]), torch.zeros(2, 2), shares))
        >>> metric.compute()
        tensor(0.6250)
    """

    definition = curves.INSERTION
    higher_is_better = definition.higher_is_better


class Deletion(MeanOverImages):
    """The mean AUC of `deletion`; see `MeanOverImages`.

    Example:
        >>> from captum_ext.metrics import Curve
        >>> metric = Deletion()
        >>> shares = torch.tensor([0.0, 1.0])
        >>> metric.update(Curve(torch.tensor([0.25, 0.5]), torch.zeros(2, 2), shares))
        >>> metric.compute()
        tensor(0.3750)
    """

    definition = curves.DELETION
    higher_is_better = definition.higher_is_better


class Overall(MeanOverImages):
    """The mean of `overall_score` and of its two AUCs: "score", "insertion" and "deletion".

    See `MeanOverImages`.

    Example:
        >>> from captum_ext.metrics import Curve, OverallScore
        >>> shares = torch.tensor([0.0, 1.0])
        >>> up, down = (Curve(torch.tensor([a]), torch.zeros(1, 2), shares) for a in (0.75, 0.25))
        >>> metric = Overall()
        >>> metric.update(OverallScore(up.auc - down.auc, up, down))
        >>> metric.compute()
        {'score': tensor(0.5000), 'insertion': tensor(0.7500), 'deletion': tensor(0.2500)}
    """

    definition = curves.OVERALL
    higher_is_better = definition.higher_is_better
    names = ("score", "insertion", "deletion")


class AverageDrop(MeanOverImages):
    """The mean of `average_drop`, a share of 1; see `MeanOverImages`.

    Example:
        >>> metric = AverageDrop()
        >>> metric.update(torch.tensor([0.0, 0.5]))
        >>> metric.compute()
        tensor(0.2500)
    """

    definition = confidence.AVERAGE_DROP
    higher_is_better = definition.higher_is_better


class IncreaseInConfidence(MeanOverImages):
    """The share of images that have an `increase_in_confidence`; see `MeanOverImages`.

    Example:
        >>> metric = IncreaseInConfidence()
        >>> metric.update(torch.tensor([True, False, False, True]))
        >>> metric.compute()
        tensor(0.5000)
    """

    definition = confidence.INCREASE
    higher_is_better = definition.higher_is_better


class Road(MeanOverImages):
    """The mean scores of `road`, over images and percentiles: "combined", "morf" and "lerf".

    See `MeanOverImages`.

    Example:
        >>> from captum_ext.metrics import RoadScores
        >>> metric = Road()
        >>> morf, lerf = torch.tensor([[0.25, 0.5]]), torch.tensor([[0.75, 0.5]])
        >>> score = (lerf - morf).mean(1) / 2
        >>> metric.update(RoadScores(score, morf, lerf, torch.tensor([10.0, 90.0])))
        >>> metric.compute()
        {'combined': tensor(0.1250), 'morf': tensor(0.3750), 'lerf': tensor(0.6250)}
    """

    definition = ROAD
    higher_is_better = definition.higher_is_better
    names = ("combined", "morf", "lerf")


# --- scores of maps and regions ------------------------------------------------------------------


class MeanOverRegions(SummedMetric):
    """The mean of a score of map and region, over all examples and over the difficult ones."""

    definition: ClassVar[_definition.Definition]
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    total: Tensor
    count: Tensor

    def __init__(self, options: localization.RegionOptions, score: Any, kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.definition.check is not None:
            self.definition.check(**score)
        self.options, self.score = options, score
        total, count = localization.zeros(options)
        self._add_sums((options, score), total=total, count=count)

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
        state = (self.total, self.count)
        score = partial(self.definition.function, **self.score)
        self.total, self.count = localization.update(
            state, score, attributions, masks, target, difficult, self.options
        )

    def compute(self) -> dict[str, Tensor]:
        """{"all": ..., "difficult": ...}; NaN where there was no example."""
        return localization.compute(self.total, self.count, self.options)


class PointingGame(MeanOverRegions):
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

    definition = localization.ENERGY

    def __init__(
        self,
        num_classes: int | None = None,
        average: str = "micro",
        ignore_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(localization.RegionOptions(num_classes, average, ignore_empty), {}, kwargs)


# --- boxes and pixels, at all thresholds ---------------------------------------------------------


class MaxBoxAcc(SummedMetric):
    r"""The share of images whose object is boxed, at the threshold that is best for all of them.

    .. math:: \operatorname{MaxBoxAcc}(\delta)
        = \max_\tau \frac1N \sum_n [\operatorname{IoU}_n(\tau) \ge \delta]

    One threshold serves all images, so it is chosen with the boxes in hand: an upper bound, by
    design. `MaxBoxAcc()` is the metric of that name; with ``iou_thresholds=(0.3, 0.5, 0.7),
    contours="all"``, each IoU with a threshold of its own and then averaged, it is MaxBoxAccV2.
    Published figures are of ``convention="wsolevaluation"``. V2 does not punish false regions
    elsewhere in the picture: show `PxAP` beside it.

    Args:
        iou_thresholds: delta.
        contours: "largest" or "all"; see `box_ious`.
        convention: "components" or "wsolevaluation"; see `box_ious`.
        **kwargs: see `torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range; see `box_ious` for those of `update`.

    Example:
        >>> metric = MaxBoxAcc(iou_thresholds=(0.3, 0.5, 0.7), contours="all")
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2:5, 2:6] = 1
        >>> metric(maps, [torch.tensor([[2, 2, 6, 4]])])
        tensor(0.6667)
    """

    higher_is_better = True
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
        hits, count = wsol.zeros(self.options)
        self._add_sums(self.options, hits=hits, count=count)

    def update(self, maps: Tensor, boxes: Sequence[Tensor], counted: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            maps: (B, H, W) or (B, C, H, W), in [0, 1]; see `box_ious`.
            boxes: for each image (n, 4).
            counted: (B,), bool: images that are not can be no hit. With the images whose label is
                the classifier's first answer, or among its first five, this is top-1 or top-5
                localisation. None counts all.
        """
        ious = wsol.box_ious(maps, boxes, self.options.contours, self.options.convention)
        hits = wsol.box_hits(ious, self.options, counted)
        self.hits = self.hits + hits.sum(0).to(self.hits.device)
        self.count = self.count + len(ious)

    def compute(self) -> Tensor:
        """In [0, 1]; NaN without an image."""
        return wsol.max_box_acc(self.hits, self.count)

    def curves(self) -> Tensor:
        """BoxAcc at each IoU and threshold: (len(iou_thresholds), 1000)."""
        return wsol.box_acc(self.hits, self.count)


class PixelCounts(SummedMetric):
    """The `pixel_counts` of all images together, of which `PxAP` and `PxIoU` are functions."""

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    inside: Tensor
    outside: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zeros = torch.zeros(pixels.N_STEPS + 1, dtype=torch.int64)
        self._add_sums(inside=zeros, outside=zeros.clone())

    @classmethod
    def _source(cls) -> type:
        """The class whose `update` it is: PxAP and PxIoU are functions of the same sums."""
        return next(base for base in cls.__mro__ if "update" in vars(base))

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
        inside, outside = pixels.pixel_counts(maps, masks, ignored)
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
        return pixels.px_ap(self.inside, self.outside).float()


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
        return pixels.px_iou_curve(self.inside, self.outside).float()

    def threshold(self) -> Tensor:
        """The best threshold, the smallest of them; NaN where no pixel was in a mask."""
        curve = self.curve()
        return torch.where(curve[0].isnan(), torch.nan, curve.argmax() / pixels.N_STEPS)
