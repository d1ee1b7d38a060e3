"""What is read out of the rows: figures and curves of a data set.

What a measure takes of a row is a vector, and each figure of a data set is a function of the
vectors' sum and their number: so a resample of the images is a weighted sum, for means as for
MaxBoxAcc, whose threshold is chosen anew in each resample.
"""

import inspect
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from captum_ext._checks import check_choice, check_range, closest
from captum_ext.evaluation.examples import Prepared
from captum_ext.evaluation.records import (
    Array,
    Curves,
    Explained,
    Ious,
    Numbers,
    PixelCounts,
    Record,
    infidelity_to_noise,
    label_in_top,
    of_maps,
    of_model,
    of_region,
    sensitivity_to_noise,
    unpacked,
)
from captum_ext.metrics import (
    average_drop,
    deletion,
    energy_pointing_game,
    increase_in_confidence,
    insertion,
    pointing_game,
    road,
    total_variation,
)
from captum_ext.metrics.masks import NORMS
from captum_ext.metrics.wsol import CONVENTIONS

Row = Mapping[str, str]
SHARES = np.linspace(0, 1, 101)  # at which curves of different images are averaged
_OURS = ("show_progress", "generator")  # are evaluate's own
_THRESHOLDS = np.arange(1000) / 1000
_LEVELS = np.arange(1001) / 1000


class Measure(ABC):
    """One figure of the data set: the mean of its numbers, if nothing else is said.

    Attributes:
        name: by which it is asked for.
        higher_is_better: or lower.
        options: as they were given.
        records: what it is read out of. Two measures may share one.
        axis: what its curve is over, and its values there; None: there is no curve.
        summed: what its vectors are called. Two measures may share them.
    """

    name: str
    higher_is_better: bool = True
    options: Mapping[str, Any]
    records: Sequence[Record]
    axis: ClassVar[tuple[str, Array] | None] = None

    @property
    def summed(self) -> str:
        return self.name

    def columns(self) -> list[str]:
        return [column for record in self.records for column in record.columns]

    def serves(self, example: Prepared) -> bool:
        return all(record.serves(example) for record in self.records)

    def vector(self, row: Row) -> Array:
        """What is summed over images."""
        return np.array([float(row[self.name])])

    def figure(self, sums: Array, counts: Array) -> Array:
        """Of sums (R, d) of the vectors of so many images, (R,): the figure, (R,)."""
        figures: Array = sums[:, 0] / counts
        return figures

    def curve(self, sums: Array, counts: Array) -> Array:
        """Of the same: the values over `axis`, (R, n)."""
        raise NotImplementedError


# --- localisation --------------------------------------------------------------------------------


class _Pointing(Measure):
    name = "pointing_game"

    def __init__(self, tolerance: float = 15) -> None:
        check_range("tolerance", tolerance, 0, 1e9)
        self.options = {"tolerance": tolerance}
        function = partial(of_region, pointing_game, self.options)
        self.records = [Numbers(self.name, function, _region)]


class _Energy(Measure):
    name = "energy"

    def __init__(self) -> None:
        self.options = {}
        function = partial(of_region, energy_pointing_game, {})
        self.records = [Numbers(self.name, function, _region)]


class _MaxBoxAcc(Measure):
    name = "max_box_acc"
    contours: ClassVar[str] = "largest"
    default: ClassVar[tuple[float, ...]] = (0.5,)
    axis = "threshold", _THRESHOLDS

    def __init__(
        self, iou_thresholds: Sequence[float] | None = None, convention: str = "components"
    ) -> None:
        check_choice("convention", convention, CONVENTIONS)
        self.deltas = self.default if iou_thresholds is None else tuple(iou_thresholds)
        for delta in self.deltas:
            check_range("iou_thresholds", delta, 0, 1)
        if not self.deltas:
            raise ValueError("`iou_thresholds` must be at least one number.")
        self.options = {"iou_thresholds": list(self.deltas), "convention": convention}
        self.ious = Ious(self.contours, convention)
        self.records = [self.ious]

    def vector(self, row: Row) -> Array:
        ious = unpacked(row[self.ious.columns[0]], "<f4")
        return np.concatenate([ious >= np.float32(delta) for delta in self.deltas])

    def figure(self, sums: Array, counts: Array) -> Array:
        best = sums.reshape(len(sums), len(self.deltas), -1).max(2).mean(1)
        figures: Array = best / counts
        return figures

    def curve(self, sums: Array, counts: Array) -> Array:
        accuracies: Array = sums.reshape(len(sums), len(self.deltas), -1).mean(1)
        return accuracies / counts[:, None]


class _MaxBoxAccV2(_MaxBoxAcc):
    name, contours, default = "max_box_acc_v2", "all", (0.3, 0.5, 0.7)


class _Top1(_MaxBoxAcc):
    """A box counts only if the model's first k answers have the label."""

    name, k = "top_1_localization", 1

    def __init__(
        self, iou_thresholds: Sequence[float] | None = None, convention: str = "components"
    ) -> None:
        super().__init__(iou_thresholds, convention)
        self.right = f"label_in_top_{self.k}"
        self.records = [self.ious, Numbers(self.right, partial(label_in_top, self.k))]

    def vector(self, row: Row) -> Array:
        return super().vector(row) & (float(row[self.right]) > 0)


class _Top5(_Top1):
    name, k = "top_5_localization", 5


class _Pixels(Measure):
    def __init__(self) -> None:
        self.options = {}
        self.records = [PixelCounts()]

    @property
    def summed(self) -> str:
        return "pixel_counts"

    def vector(self, row: Row) -> Array:
        return unpacked(row["pixel_counts"], "<i4")

    @staticmethod
    def positives(sums: Array) -> tuple[Array, Array]:
        """True ones and false ones at or above each threshold, each (R, 1001)."""
        levels = sums.reshape(len(sums), 2, -1)[:, :, ::-1].cumsum(2)[:, :, ::-1]
        return levels[:, 0], levels[:, 1]


class _PxAP(_Pixels):
    name = "pxap"
    axis = "recall", SHARES

    def figure(self, sums: Array, counts: Array) -> Array:
        precision, recall = self._precision(sums)
        figures: Array = (precision * np.diff(recall, axis=1, prepend=0)).sum(1)
        return figures

    def curve(self, sums: Array, counts: Array) -> Array:
        """Precision at the first threshold, from above, that has the recall; at 0, any recall."""
        least = np.maximum(SHARES, 1e-9)
        found = [
            precision[np.searchsorted(recall, least).clip(max=len(recall) - 1)]
            for precision, recall in zip(*self._precision(sums), strict=True)
        ]
        return np.stack(found)

    def _precision(self, sums: Array) -> tuple[Array, Array]:
        """And recall, from the highest threshold to the lowest."""
        right, wrong = (each[:, ::-1] for each in self.positives(sums))
        return right / np.maximum(right + wrong, 1), right / right[:, -1:]


class _PxIoU(_Pixels):
    name = "px_iou"
    axis = "threshold", _LEVELS

    def figure(self, sums: Array, counts: Array) -> Array:
        figures: Array = self.curve(sums, counts).max(1)
        return figures

    def curve(self, sums: Array, counts: Array) -> Array:
        right, wrong = self.positives(sums)
        ious: Array = right / (right[:, :1] + wrong)
        return ious


# --- faithfulness, robustness, smoothness --------------------------------------------------------


class _Options(Measure):
    """The options are keywords of a function."""

    function: ClassVar[Callable[..., Any]]

    def __init__(self, **options: Any) -> None:
        parameters = inspect.signature(type(self).function).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _OURS]
        for option in options:
            check_choice(f"metrics: {self.name}", option, known)
        self.options = options


class _Score(_Options):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.records = [Numbers(self.name, partial(of_model, type(self).function, options))]


class _Insertion(_Options):
    name, function = "insertion", insertion
    axis = "share of the pixels", SHARES

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.records = [Curves(self.name, partial(of_model, type(self).function, options))]

    def vector(self, row: Row) -> Array:
        shares, scores = unpacked(row[f"{self.name}_curve"], "<f4").reshape(2, -1)
        return np.concatenate((super().vector(row), np.interp(SHARES, shares, scores)))

    def curve(self, sums: Array, counts: Array) -> Array:
        return sums[:, 1:] / counts[:, None]


class _Deletion(_Insertion):
    name, function, higher_is_better = "deletion", deletion, False


class _Overall(Measure):
    """Out of the records of insertion and deletion, with the options that they are given."""

    name = "overall_score"

    def __init__(self) -> None:
        self.options = {}
        self.records = [*_Insertion().records, *_Deletion().records]

    def vector(self, row: Row) -> Array:
        return np.array([float(row["insertion"]) - float(row["deletion"])])


class _AverageDrop(_Score):
    name, function, higher_is_better = "average_drop", average_drop, False


class _Increase(_Score):
    name, function = "increase_in_confidence", increase_in_confidence


class _Road(_Score):
    name, function = "road", road


class _Captums(_Options):
    higher_is_better = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.records = [Numbers(self.name, partial(type(self).function, **options))]


class _Infidelity(_Captums):
    name, function = "infidelity", infidelity_to_noise


class _Sensitivity(_Captums):
    name, function = "sensitivity_max", sensitivity_to_noise


class _Variation(Measure):
    name, higher_is_better = "total_variation", False

    def __init__(self, norm: str = "squared") -> None:
        check_choice("norm", norm, NORMS)
        self.options = {"norm": norm}
        self.records = [Numbers(self.name, partial(of_maps, total_variation, self.options))]


# --- by name -------------------------------------------------------------------------------------


class _Custom(Measure):
    """A function of the caller's."""

    def __init__(self, name: str, function: Callable[[Explained], Any], higher: bool) -> None:
        self.name, self.higher_is_better = name, higher
        self.options = {"function": function, "higher_is_better": higher}
        self.records = [Numbers(name, function)]


LOCALIZATION = (_Pointing, _Energy, _MaxBoxAcc, _MaxBoxAccV2, _PxAP, _PxIoU)
_OTHERS = (
    *(_Top1, _Top5, _Insertion, _Deletion, _Overall, _AverageDrop, _Increase, _Road),
    *(_Infidelity, _Sensitivity, _Variation),
)
MEASURES: Mapping[str, type[Any]] = {m.name: m for m in LOCALIZATION + _OTHERS}


def make_measures(metrics: Any, known: Sequence[Prepared]) -> list[Measure]:
    """The measures of `evaluate`'s argument.

    Args:
        metrics: names, or a mapping from names to options or functions; None is "localization".
        known: some examples, whose ground truth says what "localization" is.
    """
    if metrics is None:
        metrics = ["localization"]
    if isinstance(metrics, str):
        metrics = [metrics]
    items = metrics.items() if isinstance(metrics, Mapping) else ((name, {}) for name in metrics)
    made: dict[str, Measure] = {}
    for name, value in items:
        value = {} if value is None else value
        if name == "localization" and value == {}:
            every = [kind() for kind in LOCALIZATION]
            # Where no example is known, rows say why.
            made |= {m.name: m for m in every if not known or any(m.serves(e) for e in known)}
        elif callable(value) and name not in MEASURES:
            made[name] = _Custom(name, value, bool(getattr(value, "higher_is_better", True)))
        elif name in MEASURES and isinstance(value, Mapping):
            made[name] = MEASURES[name](**value)
        else:
            near = closest(str(name), ["localization", *MEASURES])
            raise ValueError(
                f"`metrics` must be names of {['localization', *MEASURES]}, with options where "
                f"they are a mapping (of single metrics, not of 'localization'), or other names "
                f"with functions, got {name!r}: {value!r}. Closest: {near}"
            )
    if _Overall.name in made:
        both = [made.get(kind.name) or kind() for kind in (_Insertion, _Deletion)]
        made[_Overall.name].records = [record for one in both for record in one.records]
    if not made:
        raise ValueError(
            f"`metrics`: the first {len(known)} examples of `data` that can be read have neither "
            f"boxes nor masks, so that no localisation can be measured: name others, of "
            f"{list(MEASURES)}."
        )
    return list(made.values())


def measure_of(name: str, options: Mapping[str, Any]) -> Measure:
    """The measure of a run, to read its rows, for which only the options of boxes matter."""
    if name not in MEASURES:
        return _Custom(name, lambda found: None, options.get("higher_is_better", True))
    kind = MEASURES[name]
    measure: Measure = kind(**options) if issubclass(kind, _MaxBoxAcc) else kind()
    return measure


def _region(example: Prepared) -> Any:
    """None where no pixel is in it: there is nothing to point at."""
    region = example.region
    return None if region is None or not bool(region.any()) else region
