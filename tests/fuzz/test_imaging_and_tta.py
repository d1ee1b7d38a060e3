"""Images: resizing, warping, blurring, scaling, infills, and crops by masks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Generator, Tensor

from captum_ext import imaging, tta
from captum_ext.attr.wrappers.super_resolution import euclidean
from captum_ext.infill import NAMES, Infill, blend
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
from tests.fuzz.test_metric_functions import Maps, drawn_maps

LIMITED = tuple(v for v in VALUES if v not in ("huge", "mixed"))


@st.composite
def images(draw: Any, dims: int | None = None, values: tuple[str, ...] = VALUES) -> Tensor:
    n_dims = dims or draw(st.integers(1, 3))
    size = [draw(st.integers(1, 9 if n_dims < 3 else 5)) for _ in range(n_dims)]
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4)), *size)
    x = draw_values(
        shape,
        draw(st.sampled_from(values)),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 99)),
    )
    return lay_out(x, draw(st.sampled_from(MEMORY)))


def check_filter(function: Callable[[Tensor], Tensor], x: Tensor, rows: list[int]) -> Tensor | None:
    """Check what holds for all functions of images, and return the result."""
    check = unchanged(None, [x], rng=True)
    try:
        y: Tensor = attempt(lambda: function(x))
    except RefusedError:
        check()
        return None
    check()
    assert_same(function(x), y)
    assert y.shape[0] == x.shape[0]
    assert_close(function(x[rows].clone()), y[rows], x.dtype)
    return y


def assert_between(y: Tensor, x: Tensor) -> None:
    """Interpolation and smoothing stay between the smallest and the largest value."""
    info = torch.finfo(x.dtype)
    slack = 8 * info.eps * x.abs().double().max() + info.tiny
    assert y.double().min() >= x.double().min() - slack
    assert y.double().max() <= x.double().max() + slack


rows_of_four = st.lists(st.just(0), min_size=1, max_size=3)


@fuzz
@given(x=images(), data=st.data(), rows=rows_of_four)
def test_resizing_is_an_interpolation(x: Tensor, data: Any, rows: list[int]) -> None:
    sides = st.integers(1, 12)
    size = [data.draw(sides) for _ in range(x.dim() - 2)]
    mode = data.draw(st.sampled_from(imaging.MODES))
    align, smooth = data.draw(st.booleans()), x.dim() == 4 and data.draw(st.booleans())
    y = check_filter(lambda t: imaging.resize(t, size, mode, align, smooth), x, rows)
    if y is None:
        return
    assert (y.shape[2:], y.dtype) == (torch.Size(size), x.dtype)
    if mode != "bicubic":
        assert_between(y, x)


@fuzz
@given(
    x=images(), size=st.integers(0, 15), sigma=st.sampled_from([0.3, 2.0, 50]), rows=rows_of_four
)
def test_blurring_is_a_mean(x: Tensor, size: int, sigma: float, rows: list[int]) -> None:
    y = check_filter(lambda t: imaging.blur(t, size, sigma), x, rows)
    if y is not None:
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert_between(y, x)


@fuzz
@given(x=images(2), data=st.data(), rows=rows_of_four)
def test_warping_is_an_interpolation(x: Tensor, data: Any, rows: list[int]) -> None:
    angle, shift = data.draw(st.floats(-3, 3)), data.draw(st.floats(-5, 5))
    size = (x.shape[2], x.shape[3])
    matrix = euclidean(torch.tensor([angle]), torch.tensor([[shift, 1.0]]), size)
    mode = data.draw(st.sampled_from(["bilinear", "nearest"]))
    fill = data.draw(st.sampled_from(["zeros", "border", "reflection", 0.5]))
    y = check_filter(lambda t: imaging.warp(t, matrix, mode, fill), x, rows)
    assert y is not None
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert_between(y, torch.cat([x.flatten(), x.new_tensor([0.0, 0.5])]))
    whole = imaging.warp(x, torch.eye(3)[None], mode, fill)
    assert_close(whole, x, x.dtype, scale=0.5)  # the fill, which rounding lets in


@fuzz
@given(x=images(), q=st.floats(0, 100), rows=rows_of_four)
def test_scaling_is_in_its_range(x: Tensor, q: float, rows: list[int]) -> None:
    y = check_filter(imaging.min_max, x, rows)
    assert y is not None
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    flat = y.flatten(2)
    is_flat = (x == x.flatten(2)[..., :1].reshape(x.shape[:2] + (1,) * (x.dim() - 2))).flatten(2)
    assert torch.equal(flat.amin(2), torch.zeros_like(flat[..., 0]))
    assert torch.equal(flat.amax(2), (~is_flat.all(2)).to(y.dtype))
    p = check_filter(lambda t: imaging.percentile(t, q), x, rows)
    assert p is not None
    assert_between(p, x)
    one = check_filter(imaging.one_channel, x, rows)
    assert one is not None
    assert one.shape == x[:, :1].shape


# --- infills -------------------------------------------------------------------------------------


@fuzz
@given(x=images(2, LIMITED), name=st.sampled_from([*NAMES, None, 0.5]), seed=st.integers(0, 99))
def test_an_infill_is_in_the_range_of_the_image(x: Tensor, name: Any, seed: int) -> None:
    check = unchanged(None, [x], rng=True)
    infill = Infill(x, name)
    infill.draw(Generator().manual_seed(seed))
    generator = Generator().manual_seed(seed)
    keep = (torch.rand(len(x), 2, 1, *x.shape[2:], generator=generator) < 0.5).to(x.dtype)
    fill = infill(slice(None), keep)
    check()
    assert fill.dtype == x.dtype
    assert_between(fill, torch.cat([x.flatten(), x.new_tensor([0.0, 0.5])]))
    alone = Infill(x[:1], name)
    alone.draw(Generator().manual_seed(seed))
    assert_close(alone(slice(None), keep[:1]), fill[:1], x.dtype)
    masked = blend(x, 0.5, keep.transpose(0, 1).contiguous())
    shown = keep.transpose(0, 1).flatten(0, 1).expand_as(masked) == 1
    assert torch.equal(masked[shown], torch.cat([x, x])[shown])


# --- crops ---------------------------------------------------------------------------------------

BOX_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "threshold": st.sampled_from([0.5, 0, -1, 2.0]),
        "sigma": st.sampled_from([0, 0.5, 3]),
        "margin": st.integers(0, 4),
        "min_size": st.integers(1, 12),
        "square": st.booleans(),
    },
)


@fuzz
@given(maps=drawn_maps(), options=BOX_OPTIONS)
def test_boxes_of_masks_lie_inside(maps: Maps, options: dict[str, Any]) -> None:
    masks = maps.maps()
    boxes = tta.mask_boxes(masks, **options)
    (x1, y1, x2, y2), (height, width) = boxes.T, maps.size
    assert bool((x1 >= 0).all() & (y1 >= 0).all() & (x2 <= width).all() & (y2 <= height).all())
    is_empty = (boxes == 0).all(1)
    assert bool((((x1 < x2) & (y1 < y2)) | is_empty).all())
    if not options.get("sigma"):
        tight = tta.mask_boxes(masks, options.get("threshold", 0.5))
        inside = (boxes[:, :2] <= tight[:, :2]).all(1) & (boxes[:, 2:] >= tight[:, 2:]).all(1)
        assert bool(inside.all())


@fuzz
@given(
    case=cases(dims=2, heads=("linear", "column", "vector"), second=(None, "extra")),
    maps=drawn_maps(),
    options=BOX_OPTIONS,
    size=st.sampled_from([None, 1, (3, 4)]),
    batch=st.sampled_from([None, 1, 2]),
    score=st.sampled_from(["softmax", "logit", "sigmoid"]),
)
def test_crops_are_right_or_say_why_not(
    case: Any, maps: Maps, options: dict[str, Any], size: Any, batch: int | None, score: str
) -> None:
    assume("group norm" not in case.spec.blocks)  # torch has none of a single number
    net: DrawnNet = case.network()
    (x,), extra = case.inputs(), case.extra()
    masks = maps.maps()[:1].repeat(case.n, *[1] * (maps.maps().dim() - 1))
    masks[-1] = 0

    def run(rows: list[int]) -> Any:
        picked = tuple(
            t[rows] if isinstance(t, Tensor) and len(t) == case.n else t for t in extra or ()
        )
        return tta.crop_tta(
            net,
            x[rows],
            masks[rows],
            size=size,
            score=score,
            internal_batch_size=batch,
            additional_forward_args=picked or None,
            **options,
        )

    check = unchanged(net, [x, masks], rng=True)
    every = list(range(case.n))
    try:
        result = attempt(lambda: run(every))
    except RefusedError:
        check()
        return
    check()
    assert_finite(result)
    assert_same(run(every), result)
    if case.values not in ("huge", "mixed"):
        assert_close(run([case.n - 1]), result[-1:], case.spec.dtype, scale=1.0)
    with pytest.raises(RefusedError):
        attempt(lambda: run([]))
    assert len(tensors_of(result)) == 1
