"""The metric functions under drawn maps, masks, boxes, images and options."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from captum_ext import metrics
from captum_ext.imaging import min_max
from tests.fuzz.networks import DrawnNet
from tests.fuzz.properties import (
    RefusedError,
    assert_close,
    assert_finite,
    assert_same,
    attempt,
    fuzz,
    tensors_of,
    unchanged,
)
from tests.fuzz.strategies import DTYPES, MEMORY, VALUES, cases, draw_values, lay_out

Choices = dict[str, st.SearchStrategy[Any]]


@dataclass
class Maps:
    """Maps of B images with the objects that they should find."""

    n: int
    size: tuple[int, int]
    channels: int | None
    values: str
    memory: str
    dtype: torch.dtype
    seed: int
    is_empty: bool

    def maps(self) -> Tensor:
        shape = (self.n, *((self.channels,) if self.channels else ()), *self.size)
        return lay_out(draw_values(shape, self.values, self.dtype, self.seed), self.memory)

    def unit_maps(self) -> Tensor:
        """Maps in [0, 1] of one channel, or of several equal ones."""
        maps = self.maps()
        scaled = min_max(maps[:, None] if maps.dim() == 3 else maps[:, :1])
        scaled = scaled.expand(self.n, self.channels or 1, *self.size)
        return scaled if self.channels else scaled[:, 0]

    def masks(self) -> Tensor:
        generator = Generator().manual_seed(self.seed)
        masks = torch.rand(self.n, *self.size, generator=generator) < 0.4
        masks[:, -1, 0] = True
        masks[0] &= not self.is_empty
        return masks[:, None] if self.seed % 2 else masks

    def boxes(self) -> list[Tensor]:
        generator = Generator().manual_seed(self.seed)
        boxes = []
        for i in range(self.n):
            low = torch.rand(1 + i % 2, 2, generator=generator)
            high = low + (1 - low) * torch.rand(len(low), 2, generator=generator)
            sides = torch.tensor(self.size[::-1])
            boxes.append(torch.cat((low * sides, high * sides), 1).round())
        return boxes


@st.composite
def drawn_maps(draw: Any) -> Maps:
    return Maps(
        n=draw(st.integers(1, 4)),
        size=draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
        channels=draw(st.sampled_from([None, 1, 3])),
        values=draw(st.sampled_from(VALUES)),
        memory=draw(st.sampled_from(MEMORY)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
        is_empty=draw(st.integers(0, 9)) == 9,
    )


BOX_OPTIONS: Choices = {
    "contours": st.sampled_from(["largest", "all"]),
    "convention": st.sampled_from(["components", "wsolevaluation"]),
}
# Of each function: its arguments, the options that are drawn, and the range of its values.
REGIONS: dict[str, tuple[Callable[[Maps], tuple[Any, ...]], Choices, float]] = {
    "pointing_game": (
        lambda m: (m.maps(), m.masks()),
        {"tolerance": st.sampled_from([0, 1, 2.5, 15])},
        1,
    ),
    "energy_pointing_game": (lambda m: (m.maps(), m.masks()), {}, 1),
    "mask_iou": (lambda m: (m.masks().roll(1, -1), m.masks()), {}, 1),
    "total_variation": (
        lambda m: (m.maps(),),
        {"norm": st.sampled_from(["squared", "absolute"])},
        torch.inf,
    ),
    "pixel_iou": (lambda m: (m.unit_maps(), m.masks()), {}, 1),
    "pixel_counts": (lambda m: (m.unit_maps(), m.masks()), {}, 81),
    "box_from_map": (lambda m: (m.maps(),), {"threshold": st.sampled_from([0, 0.2, 0.99])}, 9),
    "box_ious": (lambda m: (m.unit_maps(), m.boxes()), BOX_OPTIONS, 1),
    "masks_to_boxes": (lambda m: (m.masks(),), {}, 9),
    "boxes_to_masks": (lambda m: (m.boxes(), m.size), {}, 1),
    "best_box_iou": (lambda m: (torch.stack([b[0] for b in m.boxes()]), m.boxes()), {}, 1),
}


def pick(arguments: tuple[Any, ...], rows: list[int], n: int) -> tuple[Any, ...]:
    """The arguments of some of the images."""

    def of_rows(value: Any) -> Any:
        if isinstance(value, list):
            return [value[i] for i in rows]
        return value[rows].clone() if isinstance(value, Tensor) and len(value) == n else value

    return tuple(of_rows(value) for value in arguments)


@pytest.mark.parametrize("name", REGIONS)
@fuzz
@given(maps=drawn_maps(), data=st.data())
def test_a_metric_of_maps_is_right_or_says_why_not(name: str, maps: Maps, data: Any) -> None:
    make, choices, largest = REGIONS[name]
    options = data.draw(st.fixed_dictionaries({}, optional=choices))
    function, arguments = getattr(metrics, name), make(maps)
    check = unchanged(None, [a for a in arguments if isinstance(a, Tensor)], rng=True)
    try:
        result = attempt(lambda: function(*arguments, **options))
    except RefusedError:
        check()
        return
    check()
    assert_same(function(*arguments, **options), result)
    may_overflow = name == "total_variation" and maps.values in ("huge", "mixed")
    for tensor in tensors_of(result):
        assert len(tensor) == maps.n
        if not may_overflow:
            assert_finite(tensor)
            assert not tensor.numel() or tensor.amin() >= 0
            assert not tensor.numel() or tensor.amax() <= largest + 1e-6
    rows = data.draw(st.lists(st.integers(0, maps.n - 1), min_size=1, max_size=4))
    alone = function(*pick(arguments, rows, maps.n), **options)
    if not may_overflow:
        assert_close(alone, [t[rows] for t in tensors_of(result)], torch.float32)


@pytest.mark.parametrize("name", REGIONS)
@fuzz
@given(maps=drawn_maps())
def test_no_maps_give_no_numbers_or_say_why_not(name: str, maps: Maps) -> None:
    make, _, _ = REGIONS[name]
    try:
        result = attempt(lambda: getattr(metrics, name)(*pick(make(maps), [], maps.n)))
    except RefusedError:
        return
    assert all(len(t) == 0 for t in tensors_of(result))


@fuzz
@given(maps=drawn_maps(), factor=st.sampled_from([2.0, 0.25, 1024.0]))
def test_games_do_not_depend_on_the_scale_of_maps(maps: Maps, factor: float) -> None:
    maps.values = maps.values if maps.values in ("normal", "zero", "one pixel") else "normal"
    a, masks = maps.maps(), maps.masks()
    for function in (metrics.pointing_game, metrics.energy_pointing_game):
        try:
            expected = attempt(lambda function=function: function(a, masks))
        except RefusedError:
            continue
        assert_close(function(a * factor, masks).float(), expected.float(), torch.float32)
    assert_same(metrics.box_from_map(a * factor), metrics.box_from_map(a))


# --- metrics that run a model --------------------------------------------------------------------

SCORING: Choices = {
    "score": st.sampled_from(["softmax", "logit", "sigmoid", torch.tanh]),
    "internal_batch_size": st.integers(1, 7),
}
INFILLS = st.sampled_from([None, "blur", "zeros", "mean", "local", "noise", 0.5])
STEPS = st.sampled_from([1, 3, 0.3, 1.0, 1e-9, 1000])
FAITHFULNESS: dict[str, Choices] = {
    "insertion": {"baselines": INFILLS, "step": STEPS},
    "deletion": {"baselines": INFILLS, "step": STEPS},
    "overall_score": {
        "insertion_baselines": INFILLS,
        "deletion_baselines": INFILLS,
        "step": STEPS,
    },
    "average_drop": {"baselines": INFILLS},
    "increase_in_confidence": {"baselines": INFILLS},
    "road": {
        "percentiles": st.sampled_from([(10, 50), [99.9], (1e-3,)]),
        "noise": st.sampled_from([0, 0.01]),
    },
}


@pytest.mark.parametrize("name", FAITHFULNESS)
@fuzz
@given(case=cases(dims=2, second=(None, "extra")), data=st.data())
def test_a_metric_of_models_is_right_or_says_why_not(name: str, case: Any, data: Any) -> None:
    net: DrawnNet = case.network()
    options = data.draw(st.fixed_dictionaries({}, optional=FAITHFULNESS[name] | SCORING))
    (images,), extra = case.inputs(), case.extra()
    kind = data.draw(st.sampled_from(VALUES))
    maps = draw_values((case.n, *case.spec.size), kind, case.spec.dtype, case.spec.seed)
    function = getattr(metrics, name)

    def run() -> Any:
        drawn = {"generator": Generator().manual_seed(1)} if case.requires_grad else {}
        return function(net, images, maps, case.target, extra, **options, **drawn)

    check = unchanged(net, [images, maps], rng=True)
    try:
        result = attempt(run)
    except RefusedError:
        check()
        return
    check()
    assert case.is_valid
    assert_same(run(), result)
    assert_finite(result)
    numbers = result if isinstance(result, Tensor) else tensors_of(result)[0]
    assert numbers.shape == (case.n,)
