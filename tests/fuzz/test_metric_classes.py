"""The torchmetrics classes: a metric of any split of the data is that of all data at once."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from captum_ext import metrics
from captum_ext.metrics import Curve, OverallScore, RoadScores
from tests.fuzz.properties import fuzz, tensors_of
from tests.fuzz.test_metric_functions import Maps, drawn_maps

Batch = tuple[Any, ...]


def region_options(draw: Any, maps: Maps) -> dict[str, Any]:
    average = draw(st.sampled_from(["micro", "macro", "none"]))
    classes = 3 if average != "micro" else draw(st.sampled_from([None, 3]))
    return {"num_classes": classes, "average": average, "ignore_empty": maps.is_empty}


def labels(maps: Maps) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(maps.seed)
    targets = torch.randint(3, (maps.n,), generator=generator)
    return targets, torch.rand(maps.n, generator=generator) < 0.5


def curve(maps: Maps) -> Curve:
    values = torch.rand(maps.n, 3, generator=torch.Generator().manual_seed(maps.seed))
    return Curve(values.mean(1), values, torch.tensor([0.0, 0.5, 1.0]))


def overall(maps: Maps) -> OverallScore:
    c = curve(maps)
    return OverallScore(c.auc - 0.5, c, c._replace(auc=c.auc / 2))


def road(maps: Maps) -> RoadScores:
    scores = curve(maps).scores
    return RoadScores(scores.mean(1), scores, scores + 1, torch.tensor([10.0, 50, 90]))


def region_batch(maps: Maps) -> Batch:
    return (maps.maps(), maps.masks(), *labels(maps))


# Of each class: the batch of all examples, and the options that are drawn.
CLASSES: dict[str, tuple[Callable[[Maps], Batch], Callable[[Any, Maps], dict[str, Any]]]] = {
    "PointingGame": (
        region_batch,
        lambda draw, maps: {
            "tolerance": draw(st.sampled_from([0, 1.5, 15])),
            **region_options(draw, maps),
        },
    ),
    "EnergyPointingGame": (region_batch, region_options),
    "MaxBoxAcc": (
        lambda maps: (maps.unit_maps(), maps.boxes(), labels(maps)[1]),
        lambda draw, maps: {
            "iou_thresholds": draw(st.sampled_from([(0.5,), (0.3, 0.5, 0.7)])),
            "contours": draw(st.sampled_from(["largest", "all"])),
            "convention": draw(st.sampled_from(["components", "wsolevaluation"])),
        },
    ),
    "PxAP": (lambda maps: (maps.unit_maps(), maps.masks()), lambda draw, maps: {}),
    "PxIoU": (lambda maps: (maps.unit_maps(), maps.masks()), lambda draw, maps: {}),
    "Insertion": (lambda maps: (curve(maps),), lambda draw, maps: {}),
    "Deletion": (lambda maps: (curve(maps),), lambda draw, maps: {}),
    "Overall": (lambda maps: (overall(maps),), lambda draw, maps: {}),
    "AverageDrop": (lambda maps: (curve(maps).auc,), lambda draw, maps: {}),
    "IncreaseInConfidence": (lambda maps: (labels(maps)[1],), lambda draw, maps: {}),
    "Road": (lambda maps: (road(maps),), lambda draw, maps: {}),
}


def test_all_classes_are_drawn() -> None:
    values = {name: getattr(metrics, name) for name in metrics.__all__}
    assert {n for n, v in values.items() if isinstance(v, type) and issubclass(v, Metric)} == {
        *CLASSES
    }


def split(maps: Maps, batch: Batch, cuts: Sequence[int]) -> list[Batch]:
    """The batch in parts."""
    edges = [0, *sorted(min(c, maps.n) for c in cuts), maps.n]
    return [tuple(_rows(v, slice(a, b)) for v in batch) for a, b in pairwise(edges) if b > a]


def _rows(value: Any, rows: slice) -> Any:
    """The rows of a tensor, a list, or of each field of a named tuple."""
    if isinstance(value, list | Tensor):
        return value[rows]
    fixed = {"shares", "percentiles"}
    parts = zip(value._fields, value, strict=True)
    return type(value)(*(v if name in fixed else _rows(v, rows) for name, v in parts))


def assert_equal(actual: Any, expected: Any) -> None:
    for a, b in zip(tensors_of(actual), tensors_of(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)


@contextmanager
def two_processes(metric: Metric, other: Metric) -> Iterator[None]:
    """Makes `metric` believe that `other` is the same metric in a second process."""

    def gather(tensor: Tensor, group: Any = None) -> list[Tensor]:
        names = [name for name in metric._defaults if getattr(metric, name) is tensor]
        assert len(names) == 1
        return [tensor, getattr(other, names[0])]

    metric.dist_sync_fn, metric.distributed_available_fn = gather, lambda: True
    yield
    metric.dist_sync_fn, metric.distributed_available_fn = None, lambda: False


@pytest.mark.parametrize("name", CLASSES)
@fuzz
@given(maps=drawn_maps(), cuts=st.lists(st.integers(0, 4), max_size=3), data=st.data())
def test_a_metric_of_a_split_is_that_of_all_at_once(
    name: str, maps: Maps, cuts: list[int], data: Any
) -> None:
    warnings.simplefilter("ignore")
    make_batch, draw_options = CLASSES[name]
    if name not in ("PointingGame", "EnergyPointingGame"):
        maps.is_empty = False
    options = draw_options(data.draw, maps)
    whole = make_batch(maps)
    parts = split(maps, whole, cuts)

    def make() -> Metric:
        metric: Metric = getattr(metrics, name)(**options)
        return metric

    at_once = make()
    at_once.update(*whole)
    expected = at_once.compute()
    assert_equal(at_once.compute(), expected)
    state = {n: getattr(at_once, n).clone() for n in at_once._defaults}

    in_parts = make()
    for part in parts:
        in_parts.update(*part)
        in_parts.compute()
    assert_equal(in_parts.compute(), expected)
    in_parts.reset()
    for part in parts:
        in_parts(*part)
        in_parts = pickle.loads(pickle.dumps(copy.deepcopy(in_parts)))
    assert_equal(in_parts.compute(), expected)

    metric_of_part = []
    for part in parts:
        metric = make()
        metric.update(*part)
        metric_of_part.append(metric)
    merged = make()
    for metric in metric_of_part:
        merged.merge_state(metric)
    assert_equal(merged.compute(), expected)
    if len(parts) == 2:
        with two_processes(*metric_of_part):
            assert_equal(metric_of_part[0].compute(), expected)
        metric_of_part[0]._computed = None  # torchmetrics keeps the result of both processes
        alone = make()
        alone.update(*parts[0])
        assert_equal(metric_of_part[0].compute(), alone.compute())

    stored = make()
    at_once.persistent(True)
    stored.persistent(True)
    stored.load_state_dict(at_once.state_dict())
    stored._update_count = 1
    assert_equal(stored.compute(), expected)
    for n, value in state.items():
        assert torch.equal(getattr(at_once, n), value)


@fuzz
@given(maps=drawn_maps(), cuts=st.lists(st.integers(0, 4), max_size=2))
def test_a_collection_computes_what_its_metrics_compute(maps: Maps, cuts: list[int]) -> None:
    maps.is_empty = False
    whole = (maps.unit_maps(), maps.masks())
    makers = {
        "near": lambda: metrics.PointingGame(2),
        "in": lambda: metrics.PointingGame(0),
        "energy": metrics.EnergyPointingGame,
        "ap": metrics.PxAP,
        "iou": metrics.PxIoU,
    }
    collection = MetricCollection({n: make() for n, make in makers.items()})
    for part in split(maps, whole, cuts):
        collection.update(*part)
    computed = collection.compute()
    for name, make in makers.items():
        metric = make()
        metric.update(*whole)
        value = metric.compute()
        if isinstance(value, dict):
            for key, part_value in value.items():
                assert_equal(computed[f"{name}_{key}"], part_value)
        else:
            assert_equal(computed[name], value)
