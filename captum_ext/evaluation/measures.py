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
import torch
from torch import Tensor

from captum_ext._checks import check_choice, closest
from captum_ext._errors import ArgumentError
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
    numbers_of,
    of_model,
    sensitivity_to_noise,
    unpacked,
)
from captum_ext.metrics import pixels, wsol
from captum_ext.metrics._definition import DEFINITIONS, Definition

Row = Mapping[str, str]
SHARES = np.linspace(0, 1, 101)  # at which curves of different images are averaged
# Keywords that are evaluate's own.
_OURS = ("target", "additional_forward_args", "show_progress", "generator")
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


# --- means over images ---------------------------------------------------------------------------


class _Mean(Measure):
    """The mean of the numbers of a definition."""

    def __init__(self, definition: Definition, **options: Any) -> None:
        self.name, self.higher_is_better = definition.name, definition.higher_is_better
        known = _options_of(self.name, definition.function, options)
        self.options = options if definition.takes == "model" else known | options
        if definition.check is not None:
            definition.check(**self.options)
        needs = _region if definition.takes == "region" else None
        self.records = [Numbers(self.name, partial(numbers_of, definition, self.options), needs)]


class _CurveMean(_Mean):
    """The mean of the areas under curves, and the mean of the curves."""

    axis = "share of the pixels", SHARES

    def __init__(self, definition: Definition, **options: Any) -> None:
        super().__init__(definition, **options)
        self.records = [Curves(self.name, partial(of_model, definition.function, options))]

    def vector(self, row: Row) -> Array:
        shares, scores = unpacked(row[f"{self.name}_curve"], "<f4").reshape(2, -1)
        return np.concatenate((super().vector(row), np.interp(SHARES, shares, scores)))

    def curve(self, sums: Array, counts: Array) -> Array:
        return sums[:, 1:] / counts[:, None]


class _Overall(Measure):
    """Out of the records of insertion and deletion, with the options that they are given."""

    name = "overall_score"

    def __init__(self) -> None:
        self.options = {}
        self.records = [r for name in _CURVES for r in MEASURES[name]().records]

    def vector(self, row: Row) -> Array:
        return np.array([float(row["insertion"]) - float(row["deletion"])])


class _Captums(Measure):
    """The mean of what a function of `Explained` gives, the lower the better."""

    higher_is_better = False

    def __init__(self, name: str, function: Callable[..., Any], **options: Any) -> None:
        _options_of(name, function, options)
        self.name, self.options = name, options
        self.records = [Numbers(name, partial(function, **options))]


def _options_of(name: str, function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """The options that a function has, and their defaults; an error for other ones."""
    parameters = inspect.signature(function).parameters.values()
    known = {
        p.name: p.default for p in parameters if p.default is not p.empty and p.name not in _OURS
    }
    for option in given:
        check_choice(f"metrics: {name}", option, known)
    return known


# --- figures of all images together --------------------------------------------------------------


class _MaxBoxAcc(Measure):
    name = "max_box_acc"
    contours: ClassVar[str] = "largest"
    default: ClassVar[tuple[float, ...]] = (0.5,)
    axis = "threshold", _THRESHOLDS

    def __init__(
        self, iou_thresholds: Sequence[float] | None = None, convention: str = "components"
    ) -> None:
        thresholds = self.default if iou_thresholds is None else iou_thresholds
        self.box_options = wsol.BoxOptions(thresholds, self.contours, convention)
        known = list(self.box_options.iou_thresholds)
        self.options = {"iou_thresholds": known, "convention": convention}
        self.ious = Ious(self.contours, convention)
        self.records = [self.ious]

    def vector(self, row: Row) -> Array:
        ious = _tensor(unpacked(row[self.ious.columns[0]], "<f4"))
        hits: Array = wsol.box_hits(ious[None], self.box_options).flatten().numpy()
        return hits

    def figure(self, sums: Array, counts: Array) -> Array:
        figures: Array = wsol.max_box_acc(self._hits(sums), _tensor(counts)).numpy()
        return figures

    def curve(self, sums: Array, counts: Array) -> Array:
        accuracies: Array = wsol.box_acc(self._hits(sums), _tensor(counts)).mean(1).numpy()
        return accuracies

    def _hits(self, sums: Array) -> Tensor:
        return _tensor(sums).reshape(len(sums), len(self.box_options.iou_thresholds), -1)


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

    def counts(self, sums: Array) -> tuple[Tensor, Tensor]:
        """How many pixels have which value, in the masks and outside: two (R, 1001)."""
        inside, outside = _tensor(sums).reshape(len(sums), 2, -1).unbind(1)
        return inside, outside


class _PxAP(_Pixels):
    name = "pxap"
    axis = "recall", SHARES

    def figure(self, sums: Array, counts: Array) -> Array:
        figures: Array = pixels.px_ap(*self.counts(sums)).numpy()
        return figures

    def curve(self, sums: Array, counts: Array) -> Array:
        recalls = torch.from_numpy(SHARES)
        precisions: Array = pixels.precision_at(*self.counts(sums), recalls).numpy()
        return precisions


class _PxIoU(_Pixels):
    name = "px_iou"
    axis = "threshold", _LEVELS

    def figure(self, sums: Array, counts: Array) -> Array:
        figures: Array = self.curve(sums, counts).max(1)
        return figures

    def curve(self, sums: Array, counts: Array) -> Array:
        ious: Array = pixels.px_iou_curve(*self.counts(sums)).numpy()
        return ious


def _tensor(values: Array) -> Tensor:
    return torch.tensor(values)


# --- by name -------------------------------------------------------------------------------------


class _Custom(Measure):
    """A function of the caller's."""

    def __init__(self, name: str, function: Callable[[Explained], Any], higher: bool) -> None:
        self.name, self.higher_is_better = name, higher
        self.options = {"function": function, "higher_is_better": higher}
        self.records = [Numbers(name, function)]


_CURVES = ("insertion", "deletion")
LOCALIZATION = ("pointing_game", "energy", "max_box_acc", "max_box_acc_v2", "pxap", "px_iou")
_POOLED = (_MaxBoxAcc, _MaxBoxAccV2, _PxAP, _PxIoU, _Top1, _Top5)
_ALL: Mapping[str, Callable[..., Measure]] = (
    {name: partial(_Mean, definition) for name, definition in DEFINITIONS.items()}
    | {name: partial(_CurveMean, DEFINITIONS[name]) for name in _CURVES}
    | {measure.name: measure for measure in (_Overall, *_POOLED)}
    | {
        "infidelity": partial(_Captums, "infidelity", infidelity_to_noise),
        "sensitivity_max": partial(_Captums, "sensitivity_max", sensitivity_to_noise),
    }
)
MEASURES = {name: _ALL[name] for name in (*LOCALIZATION, *_ALL)}


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
            every = [MEASURES[each]() for each in LOCALIZATION]
            # Where no example is known, rows say why.
            made |= {m.name: m for m in every if not known or any(m.serves(e) for e in known)}
        elif callable(value) and name not in MEASURES:
            made[name] = _Custom(name, value, bool(getattr(value, "higher_is_better", True)))
        elif name in MEASURES and isinstance(value, Mapping):
            made[name] = MEASURES[name](**value)
        else:
            near = closest(str(name), ["localization", *MEASURES])
            raise ArgumentError(
                f"`metrics` must be names of {['localization', *MEASURES]}, with options where "
                f"they are a mapping (of single metrics, not of 'localization'), or other names "
                f"with functions, got {name!r}: {value!r}. Closest: {near}",
                "metrics",
            )
    if _Overall.name in made:
        both = [made.get(name) or MEASURES[name]() for name in _CURVES]
        made[_Overall.name].records = [record for one in both for record in one.records]
    if not made:
        raise ArgumentError(
            f"`metrics`: the first {len(known)} examples of `data` that can be read have neither "
            f"boxes nor masks, so that no localisation can be measured: name others, of "
            f"{list(MEASURES)}.",
            "metrics",
        )
    return list(made.values())


def measure_of(name: str, options: Mapping[str, Any]) -> Measure:
    """The measure of a run, to read its rows, for which only the options of boxes matter."""
    if name not in MEASURES:
        return _Custom(name, lambda found: None, options.get("higher_is_better", True))
    measure = MEASURES[name]()
    return MEASURES[name](**options) if isinstance(measure, _MaxBoxAcc) else measure


def _region(example: Prepared) -> Any:
    """None where no pixel is in it: there is nothing to point at."""
    region = example.region
    return None if region is None or not bool(region.any()) else region
