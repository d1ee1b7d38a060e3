"""The summary of a run: figures with intervals, paired differences, failures, tables and plots."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from captum_ext._checks import check_choice, check_count, first_line
from captum_ext._errors import ArgumentError
from captum_ext._repr import bounded_repr
from captum_ext.evaluation.columns import Array
from captum_ext.evaluation.measures import Measure, stored_measure
from captum_ext.evaluation.store import SETTINGS, ResultStore, Row
from captum_ext.evaluation.stored import damage_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_BYTES = 2**36  # of the resamples' weights
_PLAIN = {"fontsize": "small", "parse_math": False}  # names may have dollar signs
_CHUNK = 512  # rows that are summed at once
_MIN_IMAGES = 10  # for an asterisk
_LEGEND = (
    "In brackets, 95% bootstrap intervals over the images; in parentheses, how many images a "
    "figure is of, where not all have it. Figures that choose the best threshold choose it anew "
    "in each resample, so that their intervals lie high."
)
_STAR = f" An asterisk: the interval is without 0, of at least {_MIN_IMAGES} images."


class Estimate(NamedTuple):
    """A figure and its 95% bootstrap interval.

    Attributes:
        value: the figure of the images.
        low: the 2.5th percentile of the resamples.
        high: the 97.5th percentile.
        images: their number.
    """

    value: float
    low: float
    high: float
    images: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Band(NamedTuple):
    """A curve and its 95% bootstrap intervals, point by point.

    Attributes:
        x: (n,).
        value: (n,), the curve of the images.
        low: (n,), the 2.5th percentiles of the resamples.
        high: (n,), the 97.5th percentiles.
        over: the label of `x`.
    """

    x: Array
    value: Array
    low: Array
    high: Array
    over: str

    def __repr__(self) -> str:
        return f"Band({len(self.x)} points over {self.over!r})"


@dataclass(frozen=True, repr=False)
class Summary:
    """The results of a run by the names of methods and metrics.

    Attributes:
        figures: of each method and metric, over the images for which the method has the metric.
        differences: for each other method and each metric, its figure minus that of `against`, over
            the images that both have, in the same resamples.
        against: the method that the others are compared with.
        images: the number of rows of each method that did not fail.
        failures: the number of rows of each method that failed.
        reasons: the first reason of each method that failed.
        seconds: of each method for one image: of the attribution, and of the metrics. They differ
            from run to run.
        higher_is_better: of each metric.
        curves: of each method, and those metrics that have one: the score while pixels are inserted
            or deleted, averaged at 101 shares of them; the accuracy of boxes at each threshold,
            averaged over the IoUs; precision over recall, for PxAP; the IoU of all pixels at each
            threshold.
    """

    figures: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Mapping[str, Estimate]]
    against: str
    images: Mapping[str, int]
    failures: Mapping[str, int]
    reasons: Mapping[str, str]
    seconds: Mapping[str, tuple[float, float]]
    higher_is_better: Mapping[str, bool]
    curves: Mapping[str, Mapping[str, Band]]

    def only(self, *metrics: str) -> "Summary":
        """The summary of some metrics, in this order.

        Raises:
            ValueError: a metric that the run does not have.
        """
        for metric in metrics:
            check_choice("metrics", metric, self.higher_is_better)

        def select(values: Mapping[str, Any]) -> dict[str, Any]:
            return {metric: values[metric] for metric in metrics if metric in values}

        return replace(
            self,
            figures={name: select(figures) for name, figures in self.figures.items()},
            differences={name: select(values) for name, values in self.differences.items()},
            higher_is_better=select(self.higher_is_better),
            curves={name: select(curves) for name, curves in self.curves.items()},
        )

    def __repr__(self) -> str:
        methods = {name: self.images[name] for name in self.figures}
        return f"Summary(images={methods}, metrics={list(self.higher_is_better)})"

    def __str__(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        """The tables of figures and differences, how to read them, and the failures."""
        metrics = list(self.higher_is_better)
        heads = [f"{_escaped(m)} {'↑' if self.higher_is_better[m] else '↓'}" for m in metrics]

        def cells(name: str, estimates: Mapping[str, Estimate], star: bool = False) -> list[Any]:
            return [name, *(_cell(estimates.get(m), self.images[name], star) for m in metrics)]

        rows = [[*cells(name, values), self.images[name]] for name, values in self.figures.items()]
        parts = [_table(["method", *heads, "images"], rows)]
        if self.differences:
            rows = [cells(name, values, star=True) for name, values in self.differences.items()]
            parts.append(_table([f"less {_escaped(self.against)}", *heads], rows))
        parts.append(_LEGEND + (_STAR if self.differences else ""))
        failed = [
            f"- {_escaped(name)}: {n} failed, the first for: {_escaped(self.reasons[name])}"
            for name, n in self.failures.items()
            if n
        ]
        return "\n\n".join(parts + (["\n".join(failed)] if failed else [])) + "\n"

    def figure(self) -> "Figure":
        """A matplotlib figure: for each metric, the methods with their intervals."""
        names = list(self.figures)
        figure, axes = _panels(list(self.higher_is_better), 1 + 0.3 * len(names), sharey=True)
        for metric, axis in axes.items():
            for i, name in enumerate(names):
                estimate = self.figures[name].get(metric)
                if estimate is not None:
                    axis.plot([estimate.low, estimate.high], [i] * 2, color=f"C{i % 10}")
                    axis.plot(estimate.value, i, "o", color=f"C{i % 10}")
            better = "higher" if self.higher_is_better[metric] else "lower"
            axis.set_title(f"{metric} ({better} is better)", **_PLAIN)
        first = next(iter(axes.values()))
        first.set_yticks(range(len(names)), names, parse_math=False)
        first.set_ylim(len(names) - 0.5, -0.5)
        return figure

    def curves_figure(self) -> "Figure":
        """A matplotlib figure: for each metric with curves, those of the methods.

        Raises:
            ValueError: no metric has curves.
        """
        metrics = [m for m in self.higher_is_better if any(m in c for c in self.curves.values())]
        if not metrics:
            raise ValueError(f"Of {list(self.higher_is_better)}, none has a curve.")
        figure, axes = _panels(metrics, 2.6, sharey=False)
        styles = ("-", "--", ":")
        for metric, axis in axes.items():
            for i, (name, curves) in enumerate(self.curves.items()):
                if metric in curves:
                    x, value, low, high, over = curves[metric]
                    style = styles[i // 10 % len(styles)]
                    axis.plot(x, value, style, color=f"C{i % 10}", label=name)
                    axis.fill_between(x, low, high, color=f"C{i % 10}", alpha=0.12, lw=0)
                    axis.set_xlabel(over, fontsize="small")
            axis.set_title(metric, **_PLAIN)
        handles = {
            label: handle
            for axis in axes.values()
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        legend = figure.legend(
            handles.values(), handles.keys(), loc="outside right upper", fontsize="small"
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        return figure


def summary(
    output: str | Path, *, against: str | None = None, resamples: int = 1000, seed: int = 0
) -> Summary:
    """Figures with intervals and paired differences from the stored results of a run.

    The run may be unfinished, or being written by another process: its finished tasks count, and
    reading does not disturb it. Tasks whose checksum does not match are left out, with a warning.

    Bootstrap resamples are drawn from the images with replacement, the same for all methods and
    metrics. Intervals lie between the percentiles 2.5 and 97.5. MaxBoxAcc takes the best threshold
    of each resample, as it does of the data set.

    Args:
        output: the folder that `evaluate` wrote.
        against: the method that the others are compared with. None is the first.
        resamples: their number.
        seed: of the resamples.

    Raises:
        FileNotFoundError: there is no run in the folder.
        ValueError: an unknown method; fewer than one resample; a damaged file; a run of another
            version.
        OSError: the folder of a killed run that cannot be written: an unfinished task must be
            rolled back in it.
    """
    check_count("resamples", resamples)
    store = ResultStore.read(output)
    names = list(store.settings["methods"])
    against = names[0] if against is None else against
    check_choice("against", against, names)
    measures = _stored_measures(store)
    n = store.settings["examples"]
    if n * (resamples + 1) > _MAX_BYTES:
        raise ArgumentError(
            f"`resamples` {resamples} of {n} images in {output} need more than "
            f"{_MAX_BYTES // 2**30} GB of memory: give fewer.",
            "resamples",
        )
    images, failures, reasons, has = _count_rows(store.rows(), names, measures, n)
    weights = _resample_weights(n, resamples, seed)
    sums: dict[tuple[str, str, str], _WeightedSums] = {}

    def sums_of(name: str, m: Measure, other: str) -> _WeightedSums:
        """The sums over the images for which both methods have the measure."""
        both = has[name, m.name] & has[other, m.name]
        same = name if (both == has[name, m.name]).all() else other
        key = (name, m.vector_name, same)
        return sums.setdefault(key, _WeightedSums(m.vector, weights, both))

    for m, name in itertools.product(measures, names):
        for other in (name, against) if name != against else names:
            sums_of(name, m, other)
    of_method = {name: [s for key, s in sums.items() if key[0] == name] for name in names}
    _add_rows(store, of_method)

    @cache
    def resampled(name: str, m: Measure, other: str) -> Array:
        return sums_of(name, m, other).apply(m.figure)

    figures: dict[str, dict[str, Estimate]] = {name: {} for name in names}
    differences: dict[str, dict[str, Estimate]] = {n: {} for n in names if n != against}
    curves: dict[str, dict[str, Band]] = {name: {} for name in names}
    for name, m in itertools.product(names, measures):
        of_one = has[name, m.name]
        both = of_one & has[against, m.name]
        if of_one.any():
            figures[name][m.name] = _estimate(resampled(name, m, name), of_one)
            if m.axis is not None:
                curves[name][m.name] = _band(sums_of(name, m, name).apply(m.curve), *m.axis)
        if name != against and both.any():
            difference = resampled(name, m, against) - resampled(against, m, name)
            differences[name][m.name] = _estimate(difference, both)
    return Summary(
        figures,
        differences,
        against,
        images,
        failures,
        reasons,
        store.seconds_per_image(),
        {m.name: m.higher_is_better for m in measures},
        curves,
    )


def _stored_measures(store: ResultStore) -> list[Measure]:
    """The measures of a run.

    Raises:
        ValueError: settings that `evaluate` does not write.
    """
    file = store.folder / SETTINGS
    measures = []
    for name, options in store.settings["metrics"].items():
        try:
            measure = stored_measure(name, options)
        except (ValueError, TypeError) as error:
            raise damage_error(file, first_line(error, 500)) from error
        columns = store.settings["columns"].get(name)
        if columns != measure.column_names():
            reason = f"the columns of {bounded_repr(name)} are {bounded_repr(columns)}"
            raise damage_error(file, reason)
        measures.append(measure)
    return measures


def _count_rows(
    rows: Iterable[Row], names: list[str], measures: list[Measure], n: int
) -> tuple[dict[str, int], dict[str, int], dict[str, str], dict[tuple[str, str], Array]]:
    """Images and failures of each method, its first reason, and which images have each measure."""
    images, failures = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    reasons: dict[str, str] = {}
    has = {(name, m.name): np.zeros(n, dtype=bool) for name in names for m in measures}
    for row in rows:
        name = row["method"]
        if row["failure"]:
            failures[name] += 1
            reasons.setdefault(name, row["failure"])
            continue
        images[name] += 1
        for m in measures:
            has[name, m.name][int(row["index"])] = all(row[c] for c in m.column_names())
    return images, failures, reasons, has


def _add_rows(store: ResultStore, sums: Mapping[str, Iterable["_WeightedSums"]]) -> None:
    """Add the rows of a run to the sums of their methods.

    Raises:
        ValueError: a row with another content than its column has.
    """
    for row in store.rows():
        for total in () if row["failure"] else sums[row["method"]]:
            try:
                total.add(row)
            except ValueError as error:
                raise ArgumentError(
                    f"`output` {store.folder}: the row of image {row['index']} by "
                    f"{row['method']!r} is damaged ({first_line(error, 500)}). Name another folder."
                ) from error


class _WeightedSums:
    """Sums of the vectors of some images, weighted by how often a resample has each image.

    Args:
        vector: makes a vector (d,) of a row.
        weights: (R + 1, n), of all images: first 1 for each, then those of R resamples.
        images: (n,), bool: the images that count.
    """

    def __init__(self, vector: Callable[[Row], Array], weights: Array, images: Array) -> None:
        self.vector, self.weights, self.images = vector, weights, images
        self.sums: Array | None = None
        self.indices: list[int] = []
        self.vectors: list[Array] = []

    def add(self, row: Row) -> None:
        index = int(row["index"])
        if self.images[index]:
            self.indices.append(index)
            self.vectors.append(self.vector(row))
            if len(self.indices) == _CHUNK:
                self._sum()

    def apply(self, function: Callable[[Array, Array], Array]) -> Array:
        """A function of sums and numbers, (R + 1, ...); NaN for resamples without these images."""
        self._sum()
        if self.sums is None:
            return np.full(len(self.weights), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            return function(self.sums, self.counts)

    @cached_property
    def counts(self) -> Array:
        """The number of images in each resample, (R + 1,)."""
        of_images = self.weights if self.images.all() else self.weights[:, self.images]
        counts: Array = of_images.sum(1, dtype=float)
        return counts

    def _sum(self) -> None:
        if self.indices:
            vectors = np.stack(self.vectors)
            # Sums of a few truth values are exact in float32, and take half the time.
            dtype = np.float32 if vectors.dtype == bool else np.float64
            part = self.weights[:, self.indices].astype(dtype) @ vectors.astype(dtype)
            self.sums = part.astype(float) if self.sums is None else self.sums + part
            self.indices, self.vectors = [], []


def _resample_weights(n: int, resamples: int, seed: int) -> Array:
    """Counts of each image in each resample, (R + 1, n); the first row is 1 for each image."""
    random = np.random.default_rng(seed)
    weights = np.ones((resamples + 1, n), dtype=np.uint8)  # an image never comes 255 times
    for row in weights[1:]:
        row[:] = np.bincount(random.integers(0, n, n), minlength=n)
    return weights


def _estimate(figures: Array, images: Array) -> Estimate:
    spread = figures[1:][np.isfinite(figures[1:])]
    low, high = np.percentile(spread, [2.5, 97.5]) if len(spread) else (np.nan, np.nan)
    return Estimate(float(figures[0]), float(low), float(high), int(images.sum()))


def _band(curves: Array, over: str, x: Array) -> Band:
    spread = curves[1:][np.isfinite(curves[1:]).all(1)]
    low, high = np.percentile(spread, [2.5, 97.5], axis=0) if len(spread) else curves[[0, 0]]
    return Band(x, curves[0], low, high, over)


def _cell(estimate: Estimate | None, images: int, star: bool) -> str:
    """A cell of a table: the estimate, its number of images if not `images`, and perhaps a star."""
    if estimate is None:
        return ""
    is_significant = estimate.images >= _MIN_IMAGES and (estimate.low > 0 or estimate.high < 0)
    of = f" ({estimate.images})" if estimate.images != images else ""
    return f"{estimate}{of}{' *' if star and is_significant else ''}"


def _panels(
    metrics: Sequence[str], height: float, *, sharey: bool
) -> tuple["Figure", dict[str, Any]]:
    """A figure with a panel for each metric, and its axes by metric."""
    from matplotlib.figure import Figure

    n_columns = min(len(metrics), 3)
    n_rows = -(-len(metrics) // n_columns)
    figure = Figure(figsize=(1.5 + 3 * n_columns, n_rows * height), layout="constrained")
    axes = list(figure.subplots(n_rows, n_columns, squeeze=False, sharey=sharey).flat)
    for axis in axes:
        axis.grid(alpha=0.3)
    for axis in axes[len(metrics) :]:
        axis.set_visible(False)
    return figure, dict(zip(metrics, axes, strict=False))


def _table(head: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_escaped(row[0]), *row[1:]] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _escaped(text: str) -> str:
    """A text as Markdown shows it, in one line: no HTML, link, emphasis or column begins in it."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
