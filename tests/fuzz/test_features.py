"""Patches that activate a unit most, and images that a unit prefers."""

import inspect
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from captum_ext.features import (
    ActivationMaximization,
    TopActivations,
    maximally_activating_patches,
)
from tests.fuzz.properties import (
    RefusedError,
    assert_close,
    assert_finite,
    assert_same,
    attempt,
    fuzz,
    unchanged,
)
from tests.fuzz.strategies import DTYPES, VALUES, cases, draw_values


def as_lists(top: TopActivations) -> tuple[Any, Any, Any]:
    return top.values.tolist(), top.indices.tolist(), top.positions.tolist()


@fuzz
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (9, 3, 4, 4))),
    values=st.sampled_from(VALUES),
    dtype=st.sampled_from(DTYPES),
    counts=st.tuples(st.integers(1, 12), st.integers(1, 5)),
    cuts=st.lists(st.integers(0, 9), max_size=4),
    levels=st.sampled_from([1, 2, 8]),
    seed=st.integers(0, 2**16),
)
def test_the_largest_activations_are_the_same_in_any_parts(
    shape: tuple[int, ...],
    values: str,
    dtype: torch.dtype,
    counts: tuple[int, int],
    cuts: list[int],
    levels: int,
    seed: int,
) -> None:
    maps = draw_values(shape, values, dtype, seed)
    if values == "normal":
        maps = (maps * levels).round()  # many ties
    whole = TopActivations(*counts)
    whole.update(maps, torch.arange(len(maps)))
    order = torch.randperm(len(maps), generator=Generator().manual_seed(seed))
    edges = [0, *sorted(min(cut, len(maps)) for cut in cuts), len(maps)]
    parts = [order[a:b] for a, b in pairwise(edges) if b > a]
    fed, merged = TopActivations(*counts), TopActivations(*counts)
    for rows in parts:
        fed.update(maps[rows], rows)
        fed = TopActivations.from_state_dict(fed.state_dict())
        part = TopActivations(*counts)
        part.update(maps[rows], rows)
        merged.merge(part)
        merged.merge(part)  # an image that comes again counts once
    assert as_lists(fed) == as_lists(whole)
    assert as_lists(merged) == as_lists(whole)
    for channel, (best, indices, positions) in enumerate(zip(*as_lists(whole), strict=True)):
        assert best == sorted(best, reverse=True)
        picked = [
            maps[i, channel, y, x].item() for i, (y, x) in zip(indices, positions, strict=True)
        ]
        assert best == picked
        assert best[0] == maps[:, channel].max().item()


@fuzz
@given(case=cases(dims=2, second=(None,)), data=st.data())
def test_patches_are_right_or_say_why_not(case: Any, data: Any) -> None:
    case.spec = replace(case.spec, dtype=torch.float32)
    net = case.network()
    shape = (case.n, case.spec.channels, *case.spec.size)
    pictures = draw_values(shape, "normal", torch.float32, case.spec.seed).sigmoid()
    statistics = [0.5] * case.spec.channels
    options = {
        "n": data.draw(st.integers(1, 5)),
        "per_image": data.draw(st.integers(1, 3)),
        "batch_size": data.draw(st.integers(1, 4)),
        "receptive_field": data.draw(st.sampled_from(["analytic", "effective", "image"])),
        "energy": data.draw(st.sampled_from([0.0, 0.5, 1.0])),
    }

    def run() -> Any:
        return maximally_activating_patches(
            net,
            case.layer,
            list(pictures),
            size=case.spec.size,
            normalize=(statistics, statistics),
            **options,
        )

    check = unchanged(net, [pictures], rng=True)
    try:
        patches = attempt(run)
    except RefusedError:
        check()
        return
    check()
    assert_finite(patches.values)
    x1, y1, x2, y2 = patches.boxes.unbind(-1)
    height, width = case.spec.size
    assert bool((x1 >= 0).all() & (y1 >= 0).all() & (x2 <= width).all() & (y2 <= height).all())
    assert bool((x1 < x2).all() & (y1 < y2).all())
    assert bool((patches.values[:, :-1] >= patches.values[:, 1:]).all())
    assert_same(run().values, patches.values)


MAXIMIZE: dict[str, st.SearchStrategy[Any]] = {
    "optimizer": st.sampled_from(["adam", "normalized", "gradient"]),
    "lr": st.sampled_from([1e-3, 0.5]),
    "parametrization": st.sampled_from(["fourier", "pixel"]),
    "l2": st.sampled_from([0.0, 1e-4]),
    "noise": st.sampled_from([0.0, 0.1]),
    "jitter": st.integers(0, 9),
    "blur_every": st.integers(0, 2),
    "blur_sigma": st.sampled_from([0.3, 2.0]),
    "clip": st.booleans(),
    "tv": st.sampled_from([0.0, 1e-3]),
}


@fuzz
@given(
    case=cases(second=(None,), values=("normal", "zero", "flat", "negative", "one pixel")),
    options=st.fixed_dictionaries({}, optional=MAXIMIZE),
    n_steps=st.integers(1, 3),
)
def test_preferred_images_are_right_or_say_why_not(
    case: Any, options: dict[str, Any], n_steps: int
) -> None:
    net = case.network()
    (x,), extra = case.inputs(), case.extra()
    assert MAXIMIZE.keys() < inspect.signature(ActivationMaximization.maximize).parameters.keys()

    def run(images: Tensor, target: Any, extra: Any) -> Any:
        generator = Generator().manual_seed(0)
        return ActivationMaximization(net).maximize(
            images, target, extra, n_steps=n_steps, generator=generator, **options
        )

    check = unchanged(net, [x], rng=True)
    try:
        result = attempt(lambda: run(x, case.target, extra))
    except RefusedError:
        check()
        return
    check()
    assert case.is_valid
    assert result.images.shape == x.shape
    assert result.images.dtype == (x.dtype if x.dtype == torch.float64 else torch.float32)
    assert_finite([result.images, result.scores, result.score_history])
    assert_same(run(x, case.target, extra).images, result.images)
    assert_close(run(x.clone(), case.target, extra).images, result.images, case.spec.dtype)
