"""Measures: figures and curves of a data set, computed from its rows.

A measure makes a vector of each row. Its figure of a data set is a function of the vectors' sum and
their number, so that a bootstrap resample needs one weighted sum. This holds for means, and for
MaxBoxAcc, which chooses the best threshold of each resample.
"""

import inspect
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from captum_ext._checks import closest
from captum_ext._errors import ArgumentError
from captum_ext._repr import bounded_repr
from captum_ext.evaluation.columns import (
    Array,
    BoxIouColumn,
    Columns,
    CurveColumns,
    ExplainedBatch,
    NumberColumn,
    PixelCountColumn,
    call_with_model,
    infidelity_to_noise,
    label_in_top,
    metric_values,
    sensitivity_to_noise,
    unpack,
)
from captum_ext.evaluation.examples import PreparedExample
from captum_ext.metrics import pixels, wsol
from captum_ext.metrics._definition import DEFINITIONS, MetricDefinition

Row = Mapping[str, str]
SHARES = np.linspace(0, 1, 101)  # where the curves of all images are averaged
# Arguments of metrics that `evaluate` passes, and not the user.
_RESERVED = ("target", "additional_forward_args", "show_progress", "generator")
_THRESHOLDS = np.arange(1000) / 1000
_MOST_IOUS = 1000  # in the settings of a stored run
_LEVELS = np.arange(1001) / 1000


class Measure(ABC):
    """A figure of the data set: the mean of a column, unless a subclass overrides `figure`.

    Attributes:
        name: in the argument `metrics`, and in the summary.
        higher_is_better: False where lower is better.
        options: as the user gave them, with defaults.
        columns: the columns that it is computed from; several measures may share some.
        axis: the label and the values of its curve's x axis; None without a curve.
    """

    name: str
    higher_is_better: bool = True
    options: Mapping[str, Any]
    columns: Sequence[Columns]
    axis: ClassVar[tuple[str, Array] | None] = None

    @property
    def vector_name(self) -> str:
        """The same for measures whose vectors are the same."""
        return self.name

    def column_names(self) -> list[str]:
        return [name for columns in self.columns for name in columns.names]

    def is_defined_for(self, example: PreparedExample) -> bool:
        return all(columns.is_defined_for(example) for columns in self.columns)

    def vector(self, row: Row) -> Array:
        """The vector (d,) of a row."""
        return np.array([float(row[self.name])])

    def figure(self, sums: Array, counts: Array) -> Array:
        """The figure (R,) of R data sets, from sums (R, d) and numbers (R,) of their vectors."""
        figures: Array = sums[:, 0] / counts
        return figures

    def curve(self, sums: Array, counts: Array) -> Array:
        """The curve (R, n) over `axis` of R data sets, from the same sums and numbers."""
        raise NotImplementedError


# --- means over images ---------------------------------------------------------------------------


class _MetricMean(Measure):
    """The mean of a metric's values."""

    def __init__(self, definition: MetricDefinition, **options: Any) -> None:
        self.name, self.higher_is_better = definition.name, definition.higher_is_better
        defaults = _checked_defaults(self.name, definition.function, options)
        self.options = options if definition.takes == "model" else defaults | options
        if definition.check is not None:
            definition.check(**self.options)
        ground_truth = _region_to_point_at if definition.takes == "region" else None
        values = partial(metric_values, definition, self.options)
        self.columns = [NumberColumn(self.name, values, ground_truth)]


class _CurveMean(_MetricMean):
    """The mean of the areas under curves, and the mean of the curves."""

    axis = "share of the pixels", SHARES

    def __init__(self, definition: MetricDefinition, **options: Any) -> None:
        super().__init__(definition, **options)
        curve = partial(call_with_model, definition.function, options)
        self.columns = [CurveColumns(self.name, curve)]

    def vector(self, row: Row) -> Array:
        shares, scores = unpack(row[f"{self.name}_curve"], "<f4").reshape(2, -1)
        return np.concatenate((super().vector(row), np.interp(SHARES, shares, scores)))

    def curve(self, sums: Array, counts: Array) -> Array:
        return sums[:, 1:] / counts[:, None]


class _OverallScore(Measure):
    """The mean of insertion minus deletion, with the options of these two."""

    name = "overall_score"

    def __init__(self) -> None:
        self.options = {}
        self.columns = [columns for name in _CURVES for columns in MEASURES[name]().columns]

    def vector(self, row: Row) -> Array:
        return np.array([float(row["insertion"]) - float(row["deletion"])])


class _CaptumMean(Measure):
    """The mean of one of Captum's metrics, which are better the lower they are."""

    higher_is_better = False

    def __init__(self, name: str, function: Callable[..., Any], **options: Any) -> None:
        _checked_defaults(name, function, options)
        self.name, self.options = name, options
        self.columns = [NumberColumn(name, partial(function, **options))]


class _CustomMean(Measure):
    """The mean of a user's function."""

    def __init__(
        self, name: str, function: Callable[[ExplainedBatch], Any], higher_is_better: bool
    ) -> None:
        self.name, self.higher_is_better = name, higher_is_better
        self.options = {"function": function, "higher_is_better": higher_is_better}
        self.columns = [NumberColumn(name, function)]


def _checked_defaults(
    name: str, function: Callable[..., Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The defaults of a metric's options.

    Raises:
        ValueError: an option that the metric does not have.
    """
    parameters = inspect.signature(function).parameters.values()
    defaults = {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not parameter.empty and parameter.name not in _RESERVED
    }
    for option in options:
        if option not in defaults:
            raise ArgumentError(
                f"`metrics: {name}` must be one of {list(defaults)}, got {option!r}.", "metrics"
            )
    return defaults


# --- figures of all images together --------------------------------------------------------------


class _MaxBoxAcc(Measure):
    """Among all thresholds, the highest accuracy of boxes."""

    name = "max_box_acc"
    contours: ClassVar[str] = "largest"
    default_ious: ClassVar[tuple[float, ...]] = (0.5,)
    axis = "threshold", _THRESHOLDS

    def __init__(
        self, iou_thresholds: Sequence[float] | None = None, convention: str = "components"
    ) -> None:
        thresholds = self.default_ious if iou_thresholds is None else iou_thresholds
        self.box_options = wsol.BoxOptions(thresholds, self.contours, convention)
        ious = list(self.box_options.iou_thresholds)
        self.options = {"iou_thresholds": ious, "convention": convention}
        self.iou_column = BoxIouColumn(self.contours, convention)
        self.columns = [self.iou_column]

    def vector(self, row: Row) -> Array:
        ious = _tensor(unpack(row[self.iou_column.names[0]], "<f4", len(_THRESHOLDS)))
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
    name, contours, default_ious = "max_box_acc_v2", "all", (0.3, 0.5, 0.7)


class _Top1Localization(_MaxBoxAcc):
    """MaxBoxAcc where a box counts only if the label is among the k highest scores."""

    name, k = "top_1_localization", 1

    def __init__(
        self, iou_thresholds: Sequence[float] | None = None, convention: str = "components"
    ) -> None:
        super().__init__(iou_thresholds, convention)
        self.label_column = f"label_in_top_{self.k}"
        is_right = NumberColumn(self.label_column, partial(label_in_top, self.k))
        self.columns = [self.iou_column, is_right]

    def vector(self, row: Row) -> Array:
        return super().vector(row) & (float(row[self.label_column]) > 0)


class _Top5Localization(_Top1Localization):
    name, k = "top_5_localization", 5


class _PixelMeasure(Measure):
    """A figure of the pixels of all images."""

    def __init__(self) -> None:
        self.options = {}
        self.columns = [PixelCountColumn()]

    @property
    def vector_name(self) -> str:
        return "pixel_counts"

    def vector(self, row: Row) -> Array:
        return unpack(row["pixel_counts"], "<i4", 2 * len(_LEVELS))

    def pixel_counts(self, sums: Array) -> tuple[Tensor, Tensor]:
        """The numbers of pixels with each of 1001 values, inside and outside of the masks."""
        inside, outside = _tensor(sums).reshape(len(sums), 2, -1).unbind(1)
        return inside, outside


class _PxAP(_PixelMeasure):
    name = "pxap"
    axis = "recall", SHARES

    def figure(self, sums: Array, counts: Array) -> Array:
        figures: Array = pixels.px_ap(*self.pixel_counts(sums)).numpy()
        return figures

    def curve(self, sums: Array, counts: Array) -> Array:
        recalls = torch.from_numpy(SHARES)
        precisions: Array = pixels.precision_at(*self.pixel_counts(sums), recalls).numpy()
        return precisions


class _PxIoU(_PixelMeasure):
    name = "px_iou"
    axis = "threshold", _LEVELS

    def figure(self, sums: Array, counts: Array) -> Array:
        figures: Array = self.curve(sums, counts).max(1)
        return figures

    def curve(self, sums: Array, counts: Array) -> Array:
        ious: Array = pixels.px_iou_curve(*self.pixel_counts(sums)).numpy()
        return ious


def _tensor(values: Array) -> Tensor:
    return torch.tensor(values, device="cpu")


# --- by name -------------------------------------------------------------------------------------


_CURVES = ("insertion", "deletion")
LOCALIZATION = ("pointing_game", "energy", "max_box_acc", "max_box_acc_v2", "pxap", "px_iou")
_POOLED = (_MaxBoxAcc, _MaxBoxAccV2, _PxAP, _PxIoU, _Top1Localization, _Top5Localization)
_ALL: Mapping[str, Callable[..., Measure]] = (
    {name: partial(_MetricMean, definition) for name, definition in DEFINITIONS.items()}
    | {name: partial(_CurveMean, DEFINITIONS[name]) for name in _CURVES}
    | {measure.name: measure for measure in (_OverallScore, *_POOLED)}
    | {
        "infidelity": partial(_CaptumMean, "infidelity", infidelity_to_noise),
        "sensitivity_max": partial(_CaptumMean, "sensitivity_max", sensitivity_to_noise),
    }
)
MEASURES = {name: _ALL[name] for name in (*LOCALIZATION, *_ALL)}


def make_measures(metrics: Any, examples: Sequence[PreparedExample]) -> list[Measure]:
    """The measures of `evaluate`'s argument `metrics`.

    Args:
        metrics: names, or a mapping from names to options or functions; None is "localization".
        examples: some examples, whose ground truth decides what "localization" contains.

    Raises:
        ValueError: an unknown name or option; no ground truth for "localization".
    """
    if metrics is None:
        metrics = ["localization"]
    if isinstance(metrics, str):
        metrics = [metrics]
    items = metrics.items() if isinstance(metrics, Mapping) else ((name, {}) for name in metrics)
    measures: dict[str, Measure] = {}
    for name, value in items:
        measures |= {m.name: m for m in _named_measures(name, value, examples)}
    if _OverallScore.name in measures:
        curves = [measures.get(name) or MEASURES[name]() for name in _CURVES]
        measures[_OverallScore.name].columns = [c for curve in curves for c in curve.columns]
    if not measures:
        raise ArgumentError(
            f"`metrics`: the first {len(examples)} examples of `data` that can be read have "
            f"neither boxes nor masks, so that no localisation can be measured: name others, of "
            f"{list(MEASURES)}."
        )
    return list(measures.values())


def _named_measures(name: Any, value: Any, examples: Sequence[PreparedExample]) -> list[Measure]:
    """The measures of one name, with its options or function."""
    value = {} if value is None else value
    if name == "localization" and value == {}:
        measures = [MEASURES[metric]() for metric in LOCALIZATION]
        # Without any example there are failed ones, whose rows have the reason.
        return [m for m in measures if not examples or any(map(m.is_defined_for, examples))]
    if callable(value) and name not in MEASURES:
        return [_CustomMean(name, value, bool(getattr(value, "higher_is_better", True)))]
    if name in MEASURES and isinstance(value, Mapping):
        return [MEASURES[name](**value)]
    names = ["localization", *MEASURES]
    raise ArgumentError(
        f"`metrics` must be names of {names}, with options where they are a mapping (of single "
        f"metrics, not of 'localization'), or other names with functions, got "
        f"{bounded_repr(name)}: {bounded_repr(value)}. Closest: {closest(str(name), names)}"
    )


def stored_measure(name: str, options: Mapping[str, Any]) -> Measure:
    """The measure of a stored run, to read its rows.

    Only the options of boxes matter here: rows contain the values of the other metrics.

    Raises:
        ValueError: options that `evaluate` does not store.
    """
    if name not in MEASURES:
        return _CustomMean(name, lambda batch: None, bool(options.get("higher_is_better", True)))
    measure = MEASURES[name]()
    if not isinstance(measure, _MaxBoxAcc):
        return measure
    thresholds = options.get("iou_thresholds")
    if {*options} != {*measure.options} or not isinstance(thresholds, list):
        raise ValueError(f"`metrics`: {name} has the options {bounded_repr(options)}")
    if len(thresholds) > _MOST_IOUS:
        raise ValueError(f"`metrics`: {name} has more than {_MOST_IOUS} IoUs")
    return MEASURES[name](**options)


def _region_to_point_at(example: PreparedExample) -> Tensor | None:
    """The region of an example; None where it is unknown or has no pixel."""
    region = example.region
    return None if region is None or not bool(region.any()) else region
