"""Metrics in a `MetricCollection`, their reprs and signatures, and the cost of importing them."""

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

import captum_ext.metrics
from captum_ext.metrics import (
    AverageDrop,
    Curve,
    Deletion,
    EnergyPointingGame,
    IncreaseInConfidence,
    Insertion,
    MaxBoxAcc,
    Overall,
    OverallScore,
    PointingGame,
    PxAP,
    PxIoU,
    Road,
    RoadScores,
)

# The first map is the object, so that all metrics agree on it; on the second they differ.
MAPS = [torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[0.3, 1.0, 0.5]]])]
MASKS = torch.tensor([[[True, False, False]]])
BOXES = [torch.tensor([[0, 0, 1, 1]])]
VALUES = [torch.tensor([1.0]), torch.tensor([0.25])]


def curve(value: Tensor) -> Curve:
    return Curve(value, torch.zeros(1, 2), torch.tensor([0.0, 1.0]))


def region_batch(maps: Tensor, value: Tensor) -> dict[str, Any]:
    return {"attributions": maps, "maps": maps, "masks": MASKS, "boxes": BOXES}


MAKE_BATCH: dict[str, Callable[[Tensor, Tensor], dict[str, Any]]] = {
    "region": region_batch,
    "curve": lambda maps, v: {"result": curve(v)},
    "numbers": lambda maps, v: {"result": v},
    "bools": lambda maps, v: {"result": v > 0.5},
    "overall": lambda maps, v: {"result": OverallScore(v, curve(v), curve(v))},
    "road": lambda maps, v: {"result": RoadScores(v, v[None], v[None], v)},
}
METRICS: dict[str, tuple[str, Callable[[], Metric]]] = {
    "near": ("region", lambda: PointingGame(2)),
    "in": ("region", lambda: PointingGame(0)),
    "in, again": ("region", lambda: PointingGame(0)),
    "in, macro": ("region", lambda: PointingGame(0, 1, "macro")),
    "in, not empty": ("region", lambda: PointingGame(0, ignore_empty=True)),
    "energy": ("region", EnergyPointingGame),
    "energy, none": ("region", lambda: EnergyPointingGame(1, "none")),
    "largest": ("region", MaxBoxAcc),
    "all": ("region", lambda: MaxBoxAcc(contours="all")),
    "0.3": ("region", lambda: MaxBoxAcc((0.3,))),
    "published": ("region", lambda: MaxBoxAcc(convention="wsolevaluation")),
    "V2": ("region", lambda: MaxBoxAcc((0.3, 0.5, 0.7), "all")),
    "V2, largest": ("region", lambda: MaxBoxAcc((0.3, 0.5, 0.7))),
    "pxap": ("region", PxAP),
    "px_iou": ("region", PxIoU),
    "insertion": ("curve", Insertion),
    "deletion": ("curve", Deletion),
    "overall": ("overall", Overall),
    "drop": ("numbers", AverageDrop),
    "increase": ("bools", IncreaseInConfidence),
    "road": ("road", Road),
}
BATCHES = {
    takes: [make(*both) for both in zip(MAPS, VALUES, strict=True)]
    for takes, make in MAKE_BATCH.items()
}


def arguments(metric: Metric, takes: str, step: int) -> dict[str, Any]:
    target = {"target": torch.tensor([0])} if getattr(metric, "options", None) else {}
    batch = BATCHES[takes][step] | target
    filtered: dict[str, Any] = metric._filter_kwargs(**batch)
    return filtered


@cache
def computed_alone(name: str) -> Any:
    takes, make = METRICS[name]
    metric = make()
    for step in range(2):
        metric.update(**arguments(metric, takes, step))
    return metric.compute()


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_all_classes_are_tested() -> None:
    made = {type(make()).__name__ for _, make in METRICS.values()}
    classes = {n for n in captum_ext.metrics.__all__ if issubclass_of_metric(n)}
    assert made == classes


def issubclass_of_metric(name: str) -> bool:
    value = getattr(captum_ext.metrics, name)
    return isinstance(value, type) and issubclass(value, Metric)


@pytest.mark.parametrize("compute_groups", [True, False])
@pytest.mark.parametrize("first", METRICS)
def test_pairs_in_a_collection_compute_the_same_as_alone(first: str, compute_groups: bool) -> None:
    others = list(METRICS)[list(METRICS).index(first) + 1 :]
    for second in others:
        (takes, make), (other_takes, make_other) = METRICS[first], METRICS[second]
        if (
            takes != other_takes
            and "result" in BATCHES[takes][0]
            and "result" in BATCHES[other_takes][0]
        ):
            # No batch serves both metrics, so that only their states can be compared.
            metrics = make(), make_other()
            for metric, of in zip(metrics, (takes, other_takes), strict=True):
                metric.update(**arguments(metric, of, 0))
            assert not MetricCollection._equal_metric_states(*metrics)
            continue
        both = MetricCollection({"a": make(), "b": make_other()}, compute_groups=compute_groups)
        for step in range(2):
            batch = (
                BATCHES[takes][step] | BATCHES[other_takes][step] | {"target": torch.tensor([0])}
            )
            both.update(**batch)
        computed = both.compute()
        for key, name in (("a", first), ("b", second)):
            expected = computed_alone(name)
            if isinstance(expected, dict):
                for part, value in expected.items():
                    assert_same(
                        computed[f"{key}_{part}" if f"{key}_{part}" in computed else part], value
                    )
            else:
                assert_same(computed[key], expected)


def test_pointing_games_of_two_tolerances_stay_apart() -> None:
    games = MetricCollection({"near": PointingGame(2), "in": PointingGame(0)})
    for peak in range(2):
        attributions = torch.zeros(1, 1, 3)
        attributions[0, 0, peak] = 1
        games.update(attributions, MASKS)
    computed = games.compute()
    assert (computed["near_all"].item(), computed["in_all"].item()) == (1.0, 0.5)


def test_equal_metrics_and_metrics_of_the_same_sums_are_updated_as_one() -> None:
    games = MetricCollection({"a": PointingGame(2), "b": PointingGame(2), "c": PointingGame(3)})
    pixels = MetricCollection({"ap": PxAP(), "iou": PxIoU()})
    for collection in (games, pixels):
        collection.update(MAPS[0], MASKS)
    assert sorted(map(sorted, games.compute_groups.values())) == [["a", "b"], ["c"]]
    assert [sorted(group) for group in pixels.compute_groups.values()] == [["ap", "iou"]]


class Halved(PxAP):
    """A metric with the same states, but other sums."""

    def update(self, maps: Tensor, masks: Tensor, ignored: Tensor | None = None) -> None:
        super().update(maps.round() if bool((maps > 0.4).sum() > 1) else maps, masks, ignored)


def test_a_subclass_with_its_own_update_is_updated_apart() -> None:
    both = MetricCollection({"own": Halved(), "px": PxAP()})
    lone = PxAP()
    for maps in MAPS:
        both.update(maps, MASKS)
        lone.update(maps, MASKS)
    assert len(both.compute_groups) == 2
    assert_same(both.compute()["px"], lone.compute())


@pytest.mark.parametrize("name", METRICS)
def test_states_survive_the_operations_of_torchmetrics(name: str) -> None:
    """Copies, pickles, devices, dtypes, resets, merges and the steps of a training loop."""
    takes, make = METRICS[name]
    expected = computed_alone(name)
    metric = make()
    names = set(metric._defaults)
    metric.update(**arguments(metric, takes, 0))
    for changed in (
        copy.deepcopy(metric),
        pickle.loads(pickle.dumps(metric)),
        copy.deepcopy(metric).half().float().to("cpu"),
        metric.clone(),
    ):
        assert isinstance(changed, type(make()))
        assert MetricCollection._equal_metric_states(changed, metric)
        changed.update(**arguments(changed, takes, 1))
        assert_same(changed.compute(), expected)
        changed.reset()
        assert set(changed._defaults) == names
        for step in range(2):
            changed(**arguments(changed, takes, step))  # `forward` adds the states of each batch
        assert_same(changed.compute(), expected)
    other = make()
    other.update(**arguments(other, takes, 1))
    metric.merge_state(other)
    assert_same(metric.compute(), expected)
    assert MetricCollection._equal_metric_states(make(), make())
    metric.set_dtype(torch.half)
    assert set(metric._defaults) == names


def test_a_stored_state_loads_into_the_same_options_only() -> None:
    near, inside = PointingGame(2), PointingGame(0)
    for metric in (near, inside):
        metric.persistent(True)
    near.update(MAPS[1], MASKS)
    again = PointingGame(2)
    again.persistent(True)
    again.load_state_dict(near.state_dict())
    again._update_count = 1
    assert_same(again.compute(), near.compute())
    with pytest.raises(RuntimeError, match="tolerance"):
        inside.load_state_dict(near.state_dict())


def test_metrics_show_their_options_without_the_defaults() -> None:
    assert repr(PointingGame(2)) == "PointingGame(2)"
    assert repr(PointingGame(num_classes=3, average="macro")) == (
        "PointingGame(num_classes=3, average='macro')"
    )
    assert repr(EnergyPointingGame(ignore_empty=True)) == "EnergyPointingGame(ignore_empty=True)"
    assert repr(MaxBoxAcc((0.3, 0.5), "all")) == "MaxBoxAcc((0.3, 0.5), contours='all')"
    assert repr(MaxBoxAcc((0.3,))) == "MaxBoxAcc((0.3,))"
    assert repr(PxAP()) == "PxAP()"
    assert repr(curve(torch.ones(1))) == (
        "Curve(auc=Tensor((1,), float32), scores=Tensor((1, 2), float32), "
        "shares=Tensor((2,), float32))"
    )


def test_higher_is_better_comes_from_the_definition() -> None:
    lower = {"AverageDrop", "Deletion"}
    for _, make in METRICS.values():
        assert make().higher_is_better == (type(make()).__name__ not in lower)


# --- imports -------------------------------------------------------------------------------------


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_metrics_and_methods_does_not_import_heavy_packages() -> None:
    heavy = ("torchvision", "torchmetrics", "lightning", "scipy", "higra")
    code = (
        "import sys, torch, captum.attr; before = set(sys.modules);"
        "import captum_ext.metrics, captum_ext.attr;"
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    assert run(code) == "[]"


def test_the_first_use_of_a_class_imports_torchmetrics() -> None:
    code = (
        "import sys, captum_ext.metrics as m; print(hasattr(m, 'Nothing'),"
        " {*m.__all__} <= {*dir(m)},"
        " 'PointingGame' in m.__all__, 'torchmetrics' in sys.modules,"
        " m.PointingGame.__name__, 'torchmetrics' in sys.modules);"
        "from captum_ext.metrics import *; print(PxAP.__name__, road.__name__, Curve.__name__)"
    )
    assert run(code) == "False True True False PointingGame True\nPxAP road Curve"


def test_public_names_have_docstrings() -> None:
    for name in captum_ext.metrics.__all__:
        assert getattr(captum_ext.metrics, name).__doc__
    assert not [name for name in captum_ext.metrics.__all__ if name.startswith("_")]


SIGNATURE = ["forward_func", "inputs", "attributions", "target", "additional_forward_args"]
SCORING = ["score", "generator", "internal_batch_size", "show_progress"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("insertion", {"baselines": "blur", "step": 1 / 28}),
        ("deletion", {"baselines": "zeros", "step": 1 / 28}),
        (
            "overall_score",
            {"insertion_baselines": "blur", "deletion_baselines": "zeros", "step": 1 / 28},
        ),
        ("average_drop", {"baselines": "zeros"}),
        ("increase_in_confidence", {"baselines": "zeros"}),
        ("road", {"percentiles": tuple(range(10, 100, 10)), "noise": 0.01}),
    ],
)
def test_signatures_name_all_arguments(name: str, options: dict[str, Any]) -> None:
    function = getattr(captum_ext.metrics, name)
    parameters = inspect.signature(function).parameters
    assert list(parameters) == [*SIGNATURE, *options, *SCORING]
    by_position = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == SIGNATURE
    defaults = options | dict(zip(SCORING, ("softmax", None, None, False), strict=True))
    assert {key: parameters[key].default for key in defaults} == defaults
    message = rf"^{name}\(\) got an unexpected keyword argument 'stepp'\. Closest: "
    with pytest.raises(TypeError, match=message):
        function(torch.sum, torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2), stepp=3)
