"""MaxBoxAcc of maps with known scores, and against a slow reference.

Parity with OpenCV is in tests/parity.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch

from captum_ext.metrics import MaxBoxAcc, box_ious
from tests.metrics.by_thresholds import hard_maps, random_boxes, reference_ious

BOTH = pytest.mark.parametrize("convention", ["components", "wsolevaluation"])
PUBLISHED = {"convention": "wsolevaluation"}


def block(value=1.0, size=(10, 12), rows=(2, 6), columns=(3, 8)):
    maps = torch.zeros(1, *size)
    maps[0, rows[0] : rows[1], columns[0] : columns[1]] = value
    return maps


def boxes(*numbers):
    return [torch.tensor([list(numbers)])]


# --- boxes, against the definition ---------------------------------------------------------------


@cache
def by_definition(seed, contours, convention):
    """The name, map, boxes and reference IoUs of 30 maps."""
    cases = []
    for i, (name, image) in enumerate(hard_maps(seed)):
        true = random_boxes(30 * seed + i, image.shape)
        cases.append((name, image, true, reference_ious(image, true, contours, convention)))
    return cases


@BOTH
@pytest.mark.parametrize("contours", ["largest", "all"])
@pytest.mark.parametrize("seed", range(8))
def test_boxes_of_240_maps_equal_the_reference(seed, contours, convention):
    for name, image, true, expected in by_definition(seed, contours, convention):
        ious = box_ious(torch.from_numpy(image)[None], [torch.tensor(true)], contours, convention)
        np.testing.assert_array_equal(ious[0].numpy(), expected, err_msg=name)


@BOTH
@pytest.mark.parametrize("contours", ["largest", "all"])
def test_max_box_acc_of_240_maps_equals_the_reference(contours, convention):
    """One metric takes maps of eight sizes, and has exactly the reference's hits."""
    deltas = (0.3, 0.5, 0.7)
    metric = MaxBoxAcc(deltas, contours, convention)
    batches = []
    for seed in range(8):
        _, images, true, ious = zip(*by_definition(seed, contours, convention), strict=True)
        metric.update(
            torch.from_numpy(np.stack(images)), [torch.tensor(corners) for corners in true]
        )
        batches.append(np.stack(ious))
    hits = [(np.concatenate(batches) >= delta).sum(0) for delta in deltas]
    assert metric.hits.tolist() == np.stack(hits).tolist()
    assert metric.count == 240
    assert metric.compute().item() == pytest.approx(np.max(hits, 1).mean() / 240)


# --- boxes: components ---------------------------------------------------------------------------


def test_components_have_tight_half_open_boxes():
    assert (box_ious(block(), boxes(3, 2, 8, 6)) == 1).all()
    ious = box_ious(block(), boxes(3, 2, 7, 5))
    assert (ious == torch.tensor(4 * 3 / (5 * 4))).all()
    corner = block(rows=(6, 10), columns=(8, 12))
    assert (box_ious(corner, boxes(8, 6, 12, 10)) == 1).all()
    assert (box_ious(corner, boxes(0, 0, 8, 6)) == 0).all()  # they touch


def test_thresholds_of_components_are_strict_and_not_rounded():
    maps = block(0.5)
    maps[0, 2:6, 3:5] = 0.25
    for scale in (1, 2, 2**-20):  # powers of two, which keep the order exactly
        ious = box_ious(maps * scale, boxes(5, 2, 8, 6))[0]
        assert ious.tolist() == pytest.approx([12 / 20] * 500 + [1.0] * 500)


def test_the_largest_component_has_the_most_pixels():
    maps = torch.zeros(1, 20, 20)
    maps[0, 1:12, 1:12] = 1
    maps[0, 3:10, 3:10] = 0  # a frame of 72 pixels
    maps[0, 14:20, 1:14] = 1  # a bar of 78
    of_frame, of_bar, of_hole = (1, 1, 12, 12), (1, 14, 14, 20), (3, 3, 10, 10)
    assert (box_ious(maps, boxes(*of_bar)) == 1).all()
    assert (box_ious(maps, boxes(*of_frame)) == 0).all()
    assert (box_ious(maps, boxes(*of_frame), "all") == 1).all()
    assert (box_ious(maps, boxes(*of_hole), "all") == torch.tensor(49 / 121)).all()  # no box


def test_every_one_of_equally_large_components_counts():
    maps = block(rows=(0, 2), columns=(0, 3)) + block(rows=(5, 8), columns=(6, 8))
    for true in ((0, 0, 3, 2), (6, 5, 8, 8)):
        assert (box_ious(maps, boxes(*true)) == 1).all()
    maps[0, 0, 0] = 0
    assert (box_ious(maps, boxes(0, 0, 3, 2)) == 0).all()


def test_a_map_without_components_has_an_iou_of_0():
    maps = torch.zeros(1, 8, 8)
    for contours in ("largest", "all"):
        assert (box_ious(maps, boxes(0, 0, 1, 1), contours) == 0).all()
    assert MaxBoxAcc((0.001,))(maps, boxes(0, 0, 8, 8)) == 0
    # A constant positive map is one region.
    assert (box_ious(maps + 0.003, boxes(0, 0, 8, 4)) == 0.5).all()


# --- boxes: wsolevaluation -----------------------------------------------------------------------


def test_a_box_ends_one_pixel_behind_its_region_except_at_the_border():
    """(3, 2, 8, 6) is the region's half-open box; the authors' code includes both ends."""
    assert (box_ious(block(), boxes(3, 2, 8, 6), **PUBLISHED) == 1).all()
    ious = box_ious(
        block(), boxes(3, 2, 7, 5), **PUBLISHED
    )  # the region's pixels, with both ends inside
    assert ious[0, 0].item() == pytest.approx(5 * 4 / (6 * 5))
    corner = block(rows=(6, 10), columns=(8, 12))
    assert (box_ious(corner, boxes(8, 6, 11, 9), **PUBLISHED) == 1).all()


def test_thresholds_are_strict_and_relative_to_the_maps_maximum():
    maps = block(0.4)
    maps[0, 2:6, 3:5] = 0.2  # bytes: 102 and 51
    ious = box_ious(maps, boxes(5, 2, 8, 6), **PUBLISHED)[0]
    iou_of_block, iou_of_part = (4 * 5) / (6 * 5), 1.0
    cut = next(i for i in range(1000) if int(i * 0.001 * 102) >= 51)
    assert ious[:cut].tolist() == pytest.approx([iou_of_block] * cut)
    assert ious[cut:].tolist() == pytest.approx([iou_of_part] * (1000 - cut))
    tiny = box_ious(maps / 100, boxes(5, 2, 8, 6), **PUBLISHED)  # all bytes are 0 or 1
    assert (tiny[0] == tiny[0, 0]).all()


def test_largest_goes_by_the_outline_and_all_includes_holes_and_islands():
    maps = torch.zeros(1, 20, 20)
    maps[0, 1:12, 1:12] = 1
    maps[0, 3:10, 3:10] = 0  # a frame, its outline 10 x 10
    maps[0, 14:20, 1:19] = 1  # more pixels, a smaller outline
    of_frame, of_bar, of_hole = (1, 1, 12, 12), (1, 14, 19, 19), (2, 2, 11, 11)
    assert box_ious(maps, boxes(*of_frame), **PUBLISHED)[0, 0] == 1
    assert box_ious(maps, boxes(*of_bar), **PUBLISHED)[0, 0] < 0.2
    for box in (of_frame, of_bar, of_hole):
        assert box_ious(maps, boxes(*box), "all", **PUBLISHED)[0, 0] == 1


def test_an_empty_map_has_the_box_of_the_first_pixel():
    for maps in (torch.zeros(1, 8, 8), torch.ones(1, 8, 8) * 0.003):
        assert (box_ious(maps, boxes(0, 0, 0, 0), **PUBLISHED) == 1).all()
        assert (box_ious(maps, boxes(4, 4, 7, 7), **PUBLISHED) == 0).all()


# --- boxes: both ---------------------------------------------------------------------------------


@BOTH
def test_diagonal_neighbours_are_one_region(convention):
    end = 6 if convention == "components" else 5
    assert box_ious(torch.eye(6)[None], boxes(0, 0, end, end), "all", convention)[0, 0] == 1


@BOTH
def test_the_best_of_several_boxes_counts(convention):
    both = [torch.tensor([[0, 0, 2, 2], [3, 2, 8, 6]])]
    assert (box_ious(block(), both, convention=convention) == 1).all()


def test_equal_channels_count_once_and_half_precision_gives_float32():
    maps = torch.cat((block(), block(0.5)))
    true = boxes(3, 2, 8, 6) * 2
    assert torch.equal(box_ious(maps, true), box_ious(maps[:, None].repeat(1, 3, 1, 1), true))
    half = box_ious(maps.bfloat16(), true)
    assert half.dtype == torch.float32


# --- MaxBoxAcc -----------------------------------------------------------------------------------


def test_one_threshold_serves_all_images():
    """Each image has a perfect threshold, but both have none in common."""
    low, high = torch.full((1, 10, 12), 0.3), torch.full((1, 10, 12), 0.0)
    low[0, 2:6, 3:8] = 1.0  # above 0.3
    high[0, 2:6, 3:8], high[0, 2, 3] = 0.25, 1.0  # below 0.25
    true = boxes(3, 2, 8, 6)
    for maps in (low, high):
        assert MaxBoxAcc()(maps, true) == 1
    assert MaxBoxAcc()(torch.cat((low, high)), true * 2) == 0.5


def test_v2_is_the_mean_of_maxima():
    maps, true = block(), boxes(3, 2, 13, 8)
    iou = box_ious(maps, true)[0, 0].item()
    assert 0.3 < iou < 0.5
    metric = MaxBoxAcc((0.3, 0.5, 0.7), "all")
    assert metric(maps, true).item() == pytest.approx(1 / 3)
    assert metric.curves().shape == (3, 1000)


def test_batches_add_up_and_images_that_are_not_counted_are_no_hits():
    maps, true = (
        torch.cat((block(), block(), block(rows=(0, 1), columns=(0, 1)))),
        boxes(3, 2, 8, 6) * 3,
    )
    metric, pieces = MaxBoxAcc(), MaxBoxAcc()
    metric.update(maps, true)
    for i in range(3):
        pieces.update(maps[i : i + 1], true[:1])
    assert metric.compute() == pieces.compute()
    assert metric.compute().item() == pytest.approx(2 / 3)
    first = MaxBoxAcc()
    first.update(maps, true, counted=torch.tensor([True, False, True]))
    assert first.compute().item() == pytest.approx(1 / 3)
    assert math.isnan(MaxBoxAcc().compute())


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.1, -0.1, float("nan")])
def test_maps_out_of_range_raise_an_error(value):
    with pytest.raises(ValueError, match="maps"):
        box_ious(block(value), boxes(0, 0, 2, 2))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: box_ious(block(), []), "boxes"),
        (lambda: box_ious(block(), [torch.zeros(0, 4)]), "boxes"),
        (lambda: box_ious(block(), [torch.zeros(4)]), "boxes"),
        (lambda: box_ious(block(), boxes(2, 0, 1, 1)), "boxes"),
        (lambda: box_ious(block(), boxes(0, 0, 1, math.nan)), "boxes"),
        (lambda: box_ious(block(), boxes(0, 0, 1, math.inf)), "boxes"),
        (lambda: box_ious(block(), boxes(0, 0, 1, 1), "outer"), "contours"),
        (lambda: box_ious(block(), boxes(0, 0, 1, 1), "all", "x"), "convention"),
        (lambda: MaxBoxAcc((1.5,)), "iou_thresholds"),
        (lambda: MaxBoxAcc(()), "iou_thresholds"),
        (lambda: MaxBoxAcc(iou_thresholds=0.5), "iou_thresholds.*got 0.5"),  # type: ignore[arg-type]
        (lambda: MaxBoxAcc("0.5"), "iou_thresholds.*got '0.5'"),  # type: ignore[arg-type]
        (lambda: MaxBoxAcc(contours="x"), "contours"),
        (lambda: MaxBoxAcc(convention="x"), "convention"),
        (
            lambda: MaxBoxAcc().update(block(), boxes(0, 0, 1, 1), torch.ones(1)),
            "counted",
        ),
    ],
)
def test_wrong_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
