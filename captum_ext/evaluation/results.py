"""What came of a run: figures with intervals, paired differences, failures; a table, a picture."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from captum_ext._checks import check_choice, check_count
from captum_ext.evaluation.measures import Measure, measure_of
from captum_ext.evaluation.records import Array
from captum_ext.evaluation.store import ResultStore, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHUNK = 512  # rows that are summed at once
_ENOUGH = 10  # images, for an asterisk
_LEGEND = (
    "In brackets, 95% bootstrap intervals over the images; in parentheses, how many images a "
    "figure is of, where not all have it. Figures that choose the best threshold choose it anew "
    "in each resample, so that their intervals lie high."
)
_STAR = f" An asterisk: the interval is without 0, of at least {_ENOUGH} images."


class Estimate(NamedTuple):
    """A figure and its 95% bootstrap interval.

    Attributes:
        value: of the images as they are.
        low: the percentile 2.5 over the resamples.
        high: the percentile 97.5.
        images: how many it is of.
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
        value: (n,), of the images as they are.
        low: (n,), the percentile 2.5 over the resamples.
        high: (n,), the percentile 97.5.
        over: what `x` is.
    """

    x: Array
    value: Array
    low: Array
    high: Array
    over: str


@dataclass(frozen=True)
class Summary:
    """What a run found, by the names of methods and metrics.

    Attributes:
        figures: of each method and metric, over the images that the method has it of.
        differences: of each method but one and each metric: its figure less that of `against`, over
            the images that both have, in the same resamples.
        against: the method that the others are compared with.
        images: how many rows of each method came to something.
        failures: how many did not.
        reasons: the first reason of each method that failed.
        seconds: of each method, for one image: of the attribution, and of the metrics. They differ
            from run to run.
        higher_is_better: of each metric.
        curves: of each method, and those metrics that have one: the score while pixels come or go,
            averaged at 101 shares of them; the accuracy of boxes at each threshold, averaged over
            the IoUs; precision over recall, for PxAP; the IoU of all pixels at each threshold.
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
        """The same of some metrics, in this order.

        Raises:
            ValueError: a metric that the run does not have.
        """
        for metric in metrics:
            check_choice("metrics", metric, self.higher_is_better)

        def some(found: Mapping[str, Any]) -> dict[str, Any]:
            return {metric: found[metric] for metric in metrics if metric in found}

        return replace(
            self,
            figures={name: some(each) for name, each in self.figures.items()},
            differences={name: some(each) for name, each in self.differences.items()},
            higher_is_better=some(self.higher_is_better),
            curves={name: some(each) for name, each in self.curves.items()},
        )

    def __str__(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        """Both tables, how to read them, and the failures."""
        metrics = list(self.higher_is_better)
        heads = [f"{m} {'↑' if self.higher_is_better[m] else '↓'}" for m in metrics]
        rows = [
            [name, *(_shown(each.get(m), self.images[name]) for m in metrics), self.images[name]]
            for name, each in self.figures.items()
        ]
        parts = [_table(["method", *heads, "images"], rows)]
        if self.differences:
            rows = [
                [name, *(_shown(each.get(m), self.images[name], star=True) for m in metrics)]
                for name, each in self.differences.items()
            ]
            parts.append(_table([f"less {_escaped(self.against)}", *heads], rows))
        parts.append(_LEGEND + (_STAR if self.differences else ""))
        failed = [
            f"- {name}: {n} failed, the first for: {self.reasons[name]}"
            for name, n in self.failures.items()
            if n
        ]
        return "\n\n".join(parts + (["\n".join(failed)] if failed else [])) + "\n"

    def figure(self) -> "Figure":
        """A matplotlib figure: for each metric, the methods with their intervals."""
        names = list(self.figures)
        picture, axes = _panels(list(self.higher_is_better), 1 + 0.3 * len(names), sharey=True)
        for metric, axis in axes.items():
            for place, name in enumerate(names):
                found = self.figures[name].get(metric)
                if found is not None:
                    axis.plot([found.low, found.high], [place] * 2, color=f"C{place % 10}")
                    axis.plot(found.value, place, "o", color=f"C{place % 10}")
            better = "higher" if self.higher_is_better[metric] else "lower"
            axis.set_title(f"{metric} ({better} is better)", fontsize="small")
        first = next(iter(axes.values()))
        first.set_yticks(range(len(names)), names)
        first.set_ylim(len(names) - 0.5, -0.5)
        return picture

    def curves_figure(self) -> "Figure":
        """A matplotlib figure: for each metric that has curves, those of the methods.

        Raises:
            ValueError: no metric has any.
        """
        metrics = [m for m in self.higher_is_better if any(m in c for c in self.curves.values())]
        if not metrics:
            raise ValueError(f"Of {list(self.higher_is_better)}, none has a curve.")
        picture, axes = _panels(metrics, 2.6, sharey=False)
        styles = ("-", "--", ":")
        for metric, axis in axes.items():
            for place, (name, curves) in enumerate(self.curves.items()):
                if metric in curves:
                    x, value, low, high, over = curves[metric]
                    style = styles[place // 10 % len(styles)]
                    axis.plot(x, value, style, color=f"C{place % 10}", label=name)
                    axis.fill_between(x, low, high, color=f"C{place % 10}", alpha=0.12, lw=0)
                    axis.set_xlabel(over, fontsize="small")
            axis.set_title(metric, fontsize="small")
        handles = {
            label: handle
            for axis in axes.values()
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        picture.legend(
            handles.values(), handles.keys(), loc="outside right upper", fontsize="small"
        )
        return picture


def summary(
    output: str | Path, *, against: str | None = None, resamples: int = 1000, seed: int = 0
) -> Summary:
    """What the rows of a run say, finished or not.

    Resamples are of images, drawn with replacement, the same ones for all methods and metrics.
    Intervals lie between the percentiles 2.5 and 97.5. MaxBoxAcc takes the best threshold of each
    resample, as it does of the data set.

    Args:
        output: the folder that `evaluate` wrote.
        against: the method that the others are compared with. None is the first.
        resamples: how many.
        seed: of the resamples.

    Raises:
        FileNotFoundError: there is no run in the folder.
        ValueError: an unknown method, or no resample.
    """
    check_count("resamples", resamples)
    store = ResultStore.read(output)
    names = list(store.settings["methods"])
    against = names[0] if against is None else against
    check_choice("against", against, names)
    measures = [measure_of(name, given) for name, given in store.settings["metrics"].items()]

    n = store.settings["examples"]
    images, failures, reasons, has = _counts(store.rows(), names, measures, n)
    weights = _weights(n, resamples, seed)
    sums: dict[tuple[str, str, str], _Sums] = {}

    def sums_of(name: str, m: Measure, other: str) -> _Sums:
        """Over the images that the method has the metric of, and the other method too."""
        both = has[name, m.name] & has[other, m.name]
        same = name if (both == has[name, m.name]).all() else other
        return sums.setdefault((name, m.summed, same), _Sums(m.vector, weights, both))

    for m, name in itertools.product(measures, names):
        for other in (name, against) if name != against else names:
            sums_of(name, m, other)
    of_method = {name: [s for key, s in sums.items() if key[0] == name] for name in names}
    for row in store.rows():
        if not row["failure"]:
            for total in of_method[row["method"]]:
                total.add(row)

    @cache
    def resampled(name: str, m: Measure, other: str) -> Array:
        return sums_of(name, m, other).read(m.figure)

    figures: dict[str, dict[str, Estimate]] = {name: {} for name in names}
    differences: dict[str, dict[str, Estimate]] = {n: {} for n in names if n != against}
    for m in measures:
        for name in names:
            mine = has[name, m.name]
            both = mine & has[against, m.name]
            if mine.any():
                figures[name][m.name] = _estimate(resampled(name, m, name), mine)
            if name != against and both.any():
                less = resampled(name, m, against) - resampled(against, m, name)
                differences[name][m.name] = _estimate(less, both)
    return Summary(
        figures,
        differences,
        against,
        images,
        failures,
        reasons,
        store.seconds_per_image(),
        {m.name: m.higher_is_better for m in measures},
        {
            name: {
                m.name: _band(sums_of(name, m, name).read(m.curve), *m.axis)
                for m in measures
                if m.axis is not None and has[name, m.name].any()
            }
            for name in names
        },
    )


def _counts(
    rows: Iterable[Row], names: list[str], measures: list[Measure], n: int
) -> tuple[dict[str, int], dict[str, int], dict[str, str], dict[tuple[str, str], Array]]:
    """Images and failures of each method, why its first failed, and which images have a metric."""
    images, failures = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    reasons: dict[str, tuple[int, str]] = {}
    has = {(name, m.name): np.zeros(n, dtype=bool) for name in names for m in measures}
    for row in rows:
        name, place = row["method"], int(row["index"])
        if row["failure"]:
            failures[name] += 1
            reasons[name] = min(reasons.get(name, (n, "")), (place, row["failure"]))
            continue
        images[name] += 1
        for m in measures:
            has[name, m.name][place] = all(row[column] for column in m.columns())
    return images, failures, {name: why for name, (_, why) in reasons.items()}, has


class _Sums:
    """Weighted sums of the vectors of some images: row 0 each image once, then the resamples."""

    def __init__(self, vector: Callable[[Row], Array], weights: Array, images: Array) -> None:
        self.vector, self.weights, self.images = vector, weights, images
        self.sums: Array | None = None
        self.waiting: list[tuple[int, Array]] = []

    def add(self, row: Row) -> None:
        place = int(row["index"])
        if self.images[place]:
            self.waiting.append((place, self.vector(row)))
            if len(self.waiting) == _CHUNK:
                self._sum()

    def read(self, function: Callable[[Array, Array], Array]) -> Array:
        """Of sums and counts, (R + 1, ...); NaN where a resample has none of the images."""
        self._sum()
        if self.sums is None:
            return np.full(len(self.weights), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            return function(self.sums, self.counts)

    @cached_property
    def counts(self) -> Array:
        """Of images in each resample."""
        of_images = self.weights if self.images.all() else self.weights[:, self.images]
        found: Array = of_images.sum(1, dtype=float)
        return found

    def _sum(self) -> None:
        if self.waiting:
            places = [place for place, _ in self.waiting]
            vectors = np.stack([vector for _, vector in self.waiting])
            # Sums of so few truth values are exact in float32, and take half the time.
            kind = np.float32 if vectors.dtype == bool else np.float64
            part = self.weights[:, places].astype(kind) @ vectors.astype(kind)
            self.sums = part.astype(float) if self.sums is None else self.sums + part
            self.waiting = []


def _weights(n: int, resamples: int, seed: int) -> Array:
    """How often each image is in each resample, (R + 1, n); first, once in all images."""
    random = np.random.default_rng(seed)
    weights = np.ones((resamples + 1, n), dtype=np.uint8)  # none comes 255 times
    for line in weights[1:]:
        line[:] = np.bincount(random.integers(0, n, n), minlength=n)
    return weights


def _estimate(figures: Array, images: Array) -> Estimate:
    spread = figures[1:][np.isfinite(figures[1:])]
    low, high = np.percentile(spread, [2.5, 97.5]) if len(spread) else (np.nan, np.nan)
    return Estimate(float(figures[0]), float(low), float(high), int(images.sum()))


def _band(curves: Array, over: str, x: Array) -> Band:
    spread = curves[1:][np.isfinite(curves[1:]).all(1)]
    low, high = np.percentile(spread, [2.5, 97.5], axis=0) if len(spread) else curves[[0, 0]]
    return Band(x, curves[0], low, high, over)


def _shown(found: Estimate | None, images: int, star: bool = False) -> str:
    if found is None:
        return ""
    is_sure = found.images >= _ENOUGH and (found.low > 0 or found.high < 0)
    of = f" ({found.images})" if found.images != images else ""
    return f"{found}{of}{' *' if star and is_sure else ''}"


def _panels(
    metrics: Sequence[str], height: float, *, sharey: bool
) -> tuple["Figure", dict[str, Any]]:
    """A figure, and its axes by the metrics' names."""
    from matplotlib.figure import Figure

    columns = min(len(metrics), 3)
    lines = -(-len(metrics) // columns)
    picture = Figure(figsize=(1.5 + 3 * columns, lines * height), layout="constrained")
    axes = list(picture.subplots(lines, columns, squeeze=False, sharey=sharey).flat)
    for axis in axes:
        axis.grid(alpha=0.3)
    for axis in axes[len(metrics) :]:
        axis.set_visible(False)
    return picture, dict(zip(metrics, axes, strict=False))


def _table(head: list[str], rows: Iterable[list[Any]]) -> str:
    every = [head, ["---"] * len(head), *([_escaped(row[0]), *row[1:]] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in every)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
