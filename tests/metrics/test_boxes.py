"""Boxes of maps, top-k and the centre baseline, by hand and against a slow reference."""

import math
import warnings

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from captum_ext.metrics import (
    MaxBoxAcc,
    best_box_iou,
    box_from_map,
    boxes_to_masks,
    center_gaussian,
    in_top_k,
    masks_to_boxes,
)


def digit_map(*rows: str):
    """A map (1, H, W) from digits, which are tenths."""
    return torch.tensor([[[int(cell) / 10 for cell in row] for row in rows]])


def reference_box(values, threshold):
    """The box of the first of the largest regions, by flooding from each pixel in turn."""
    height, width = len(values), len(values[0])
    cut = threshold * max(max(row) for row in values)
    unvisited = {(y, x) for y in range(height) for x in range(width) if values[y][x] > cut}
    largest = []
    for start in sorted(unvisited):
        if start not in unvisited:
            continue
        unvisited.remove(start)
        region, front = [start], [start]
        while front:
            y, x = front.pop()
            for neighbour in ((y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
                if neighbour in unvisited:
                    unvisited.remove(neighbour)
                    region.append(neighbour)
                    front.append(neighbour)
        largest = region if len(region) > len(largest) else largest
    ys, xs = zip(*largest, strict=True)
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


# --- box from map --------------------------------------------------------------------------------


def test_the_larger_region_counts_and_not_the_one_with_the_maximum():
    maps = digit_map("000000", "033000", "033009", "000009", "000000")
    assert box_from_map(maps).tolist() == [[1, 1, 3, 3]]
    assert box_from_map(maps, threshold=0.4).tolist() == [[5, 2, 6, 4]]


def test_pixels_are_counted_and_not_the_area_of_the_box():
    maps = digit_map("900000", "090000", "009000", "000000", "000099", "000099")
    assert box_from_map(maps).tolist() == [[4, 4, 6, 6]]  # 4 pixels against a diagonal of 3


def test_diagonal_neighbours_are_one_region():
    maps = digit_map("90000", "09000", "00900", "00000", "00099")
    assert box_from_map(maps).tolist() == [[0, 0, 3, 3]]


def test_of_equal_regions_the_one_with_the_first_pixel_counts():
    maps = digit_map("00099", "99000", "00000")
    assert box_from_map(maps).tolist() == [[3, 0, 5, 1]]
    # The right one has the first pixel, the left one the first column and the last row.
    maps = digit_map("0000090", "9000090", "9000090", "9000000")
    assert box_from_map(maps).tolist() == [[5, 0, 6, 3]]


def test_the_threshold_is_strict_and_relative_to_the_maximum():
    ramp = torch.arange(1, 11, dtype=torch.float64).repeat(3, 1)[None]
    assert box_from_map(ramp).tolist() == [[2, 0, 10, 3]]  # above 2 of 10
    assert box_from_map(7 * ramp).tolist() == [[2, 0, 10, 3]]
    assert box_from_map(ramp, threshold=0.5).tolist() == [[5, 0, 10, 3]]
    assert box_from_map(ramp, threshold=0).tolist() == [[0, 0, 10, 3]]
    signed = torch.tensor([[[-9.0, 0.0, 1.0, 5.0]]])
    assert box_from_map(signed).tolist() == [[3, 0, 4, 1]]
    assert box_from_map(signed, threshold=0).tolist() == [[2, 0, 4, 1]]


def test_a_map_that_points_nowhere_has_the_box_of_the_image():
    maps = torch.stack(
        (torch.zeros(3, 5), -torch.rand(3, 5), digit_map("00000", "09000", "00000")[0])
    )
    with pytest.warns(UserWarning, match="whole image"):
        assert box_from_map(maps).tolist() == [[0, 0, 5, 3], [0, 0, 5, 3], [1, 1, 2, 2]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert box_from_map(torch.full((1, 3, 5), 0.4)).tolist() == [[0, 0, 5, 3]]
        assert box_from_map(torch.zeros(0, 3, 5)).shape == (0, 4)


def test_boxes_of_random_maps_equal_the_reference():
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        shape = (4, 5 + trial % 7, 4 + trial % 5)
        maps = torch.randint(0, 12, shape, generator=generator).double()
        maps[:, 0, 0] = 12
        threshold = (0.2, 0.5, 0.8)[trial % 3]
        expected = [reference_box(values.tolist(), threshold) for values in maps]
        assert box_from_map(maps, threshold).tolist() == expected


def test_equal_channels_and_all_dtypes_give_the_same_box():
    maps = digit_map("0000", "0990", "0000")
    for same in (maps[:, None].repeat(1, 3, 1, 1), maps.bfloat16(), (10 * maps).int()):
        box = box_from_map(same)
        assert box.tolist() == [[1, 1, 3, 2]]
        assert box.dtype == torch.int64


@pytest.mark.parametrize(
    ("maps", "threshold", "message"),
    [
        (torch.full((1, 4, 4), math.nan), 0.2, "maps.*not finite"),
        (torch.tensor([[[1.0, math.nan]]]), 0.2, "maps.*not finite"),
        (torch.zeros(4, 4), 0.2, r"maps.*\(4, 4\)"),
        (torch.zeros(1, 4, 4), 1.0, "threshold.*below 1"),
        (torch.zeros(1, 4, 4), -0.1, "threshold"),
    ],
)
def test_wrong_maps_and_thresholds_are_named(maps, threshold, message):
    with pytest.raises(ValueError, match=message):
        box_from_map(maps, threshold)


# --- is the box right? ---------------------------------------------------------------------------


def test_the_best_of_several_boxes_counts_as_half_open():
    predicted = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 4], [2, 2, 2, 2]])
    true = [
        torch.tensor([[4, 0, 8, 4], [2, 0, 6, 4], [0, 0, 1, 1]]),  # IoUs of 0, 8 / 24 and 1 / 16
        torch.tensor([[0, 0, 4, 2]]),
        torch.tensor([[2, 2, 2, 2]]),  # both are empty
    ]
    assert best_box_iou(predicted, true).tolist() == pytest.approx([1 / 3, 1 / 2, 0])
    assert best_box_iou(torch.zeros(0, 4), []).shape == (0,)


def test_ious_of_random_boxes_equal_torchvision():
    generator = torch.Generator().manual_seed(0)

    def boxes(n):
        corners = torch.randint(0, 9, (n, 4), generator=generator)
        return torch.cat((corners[:, :2], corners[:, :2] + corners[:, 2:] + 1), 1)

    predicted, true = boxes(50), [boxes(1 + i % 4) for i in range(50)]
    expected = [
        torchvision.ops.box_iou(box[None].float(), others.float()).amax()
        for box, others in zip(predicted, true, strict=True)
    ]
    assert torch.allclose(best_box_iou(predicted, true), torch.stack(expected))
    assert len({round(iou.item(), 3) for iou in expected}) > 20


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        ([[0, 0, 4]], [[[0, 0, 1, 1]]], r"predicted.*\(1, 3\)"),
        ([[0, 0, 4, 4]], [], "true.*each of 1"),
        ([[0, 0, 4, 4]], [[[0, 0, 1]]], r"true.*\(1, 3\)"),
        ([[0, 0, 4, 4]], [[]], "true.*at least 1"),
        ([[4, 0, 0, 4]], [[[0, 0, 1, 1]]], "predicted.*x1 <= x2"),
        ([[0, 0, 4, 4]], [[[0, 3, 1, 1]]], "true.*y1 <= y2"),
        ([[0, 0, 4, math.nan]], [[[0, 0, 1, 1]]], "predicted.*finite"),
    ],
)
def test_wrong_boxes_of_ious_are_named(predicted, true, message):
    with pytest.raises(ValueError, match=message):
        best_box_iou(torch.tensor(predicted), [torch.tensor(b) for b in true])


def test_an_image_without_a_true_box_raises_an_error():
    with pytest.raises(ValueError, match="true"):
        best_box_iou(torch.tensor([[0, 0, 4, 4]]), [torch.zeros(0, 4)])


# --- boxes and masks -----------------------------------------------------------------------------


def test_boxes_are_half_open_and_may_overlap_and_reach_outside() -> None:
    boxes = [
        torch.tensor([[1, 0, 3, 2], [2, 1, 4, 3]]),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.tensor([[-5, 2, 1, 99], [3, 3, 3, 9]]),
    ]
    expected = """
        .##.. ..... .....
        .###. ..... .....
        ..##. ..... #....
        ..... ..... #....
    """
    rows = [line.split() for line in expected.split("\n") if line.strip()]
    masks = boxes_to_masks(boxes, (4, 5))
    pictures = [["".join(".#"[int(v)] for v in m[y]) for m in masks] for y in range(4)]
    assert pictures == rows


def test_boxes_with_fractions_hold_the_pixels_whose_corner_is_inside() -> None:
    box = torch.tensor([[0.5, 1.0, 2.5, 2.0]])
    assert boxes_to_masks([box], (3, 4))[0].nonzero().tolist() == [[1, 1], [1, 2]]


@given(seed=st.integers(0, 10**6), n=st.integers(1, 5))
def test_boxes_and_masks_are_inverse(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 6, (n, 2), generator=generator)
    boxes = torch.cat((low, low + torch.randint(1, 5, (n, 2), generator=generator)), 1)
    masks = boxes_to_masks(list(boxes[:, None]), (10, 11))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert masks.flatten(1).sum(1).tolist() == sides.prod(1).tolist()
    assert masks_to_boxes(masks).tolist() == boxes.tolist()
    together = boxes_to_masks([boxes], (10, 11))
    assert torch.equal(together[0], masks.any(0))
    assert masks_to_boxes(together).tolist() == [
        [*boxes[:, :2].amin(0).tolist(), *boxes[:, 2:].amax(0).tolist()]
    ]


def test_the_box_of_an_empty_mask_is_empty() -> None:
    assert masks_to_boxes(torch.zeros(1, 1, 3, 4, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(
    "boxes",
    [
        [],
        [torch.zeros(4)],
        [torch.tensor([[3, 0, 2, 5]])],
        [torch.tensor([[0.0, 0.0, torch.nan, 5.0]])],
        [torch.tensor([[-torch.inf, 0.0, 2.0, 5.0]])],
    ],
)
def test_wrong_boxes_of_masks_are_named(boxes: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="`boxes`"):
        boxes_to_masks(boxes, (10, 10))


# --- top-1 and top-5 -----------------------------------------------------------------------------


def test_the_rank_of_the_class_decides():
    logits = torch.tensor([[5.0, 1.0, 3.0, 2.0]]).repeat(4, 1)  # the ranks are 0, 3, 1, 2
    target = torch.arange(4)
    hits = [in_top_k(logits, target, k).tolist() for k in (1, 2, 3, 4)]
    assert hits[0] == [True, False, False, False]
    assert hits[1] == [True, False, True, False]
    assert hits[2] == [True, False, True, True]
    assert hits[3] == [True] * 4


def test_classes_with_equal_logits_are_not_all_first():
    equal = torch.zeros(4, 4)
    for k in (1, 2):
        assert in_top_k(equal, torch.arange(4), k).tolist() == [i < k for i in range(4)]
    infinite = torch.tensor([[-math.inf, math.inf]])
    assert in_top_k(infinite, torch.tensor([1])).tolist() == [True]


def test_top_1_and_top_5_localisation_by_hand():
    """Four of five boxes are hits; their classes have the ranks 0, 1, 4 and 5."""
    maps = torch.zeros(5, 8, 8)
    maps[:, 2:6, 2:6] = 1
    true = [torch.tensor([[2, 2, 6, 6]])] * 4 + [torch.tensor([[0, 0, 1, 1]])]
    logits, target = -torch.arange(8.0).repeat(5, 1), torch.tensor([0, 1, 4, 5, 0])
    hits = best_box_iou(box_from_map(maps), true) >= 0.5
    for k, share in ((1, 1 / 5), (2, 2 / 5), (5, 3 / 5), (8, 4 / 5)):
        counted = in_top_k(logits, target, k)
        assert (hits & counted).float().mean().item() == pytest.approx(share)
        metric = MaxBoxAcc()
        metric.update(maps, true, counted)
        assert metric.compute().item() == pytest.approx(share)


@pytest.mark.parametrize(
    ("logits", "target", "k", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), 1, r"target.*\[0, 3\)"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), 1, "target"),
        (torch.zeros(2, 3), torch.tensor([0]), 1, r"target.*\(2,\)"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), 1, "target.*integers"),
        (torch.zeros(2), torch.tensor([0, 1]), 1, "logits"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), 1, "logits.*NaN"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), 0, "k"),
    ],
)
def test_wrong_logits_and_targets_are_named(logits, target, k, message):
    with pytest.raises(ValueError, match=message):
        in_top_k(logits, target, k)


# --- the centre ----------------------------------------------------------------------------------


def test_the_centre_by_hand():
    gaussian = center_gaussian((2, 4), sigma=0.5, dtype=torch.float64)
    assert gaussian.dtype == torch.float64
    # y / H - 1/2 is 1/4; x / W - 1/2 is 3/8 or 1/8; 2 sigma^2 is 1/2.
    outer, inner = math.exp(-2 * (1 / 16 + 9 / 64)), math.exp(-2 * (1 / 16 + 1 / 64))
    assert gaussian.tolist() == [pytest.approx([outer, inner, inner, outer])] * 2
    assert center_gaussian((3, 5))[1, 2] == 1
    assert center_gaussian((3, 5), sigma=0.1).amax() == 1


def test_the_box_of_the_centre_follows_the_formula():
    """On the axis, the map is above t where |x / W - 1/2| < sigma sqrt(-2 ln t)."""
    reach = 0.25 * math.sqrt(-2 * math.log(0.2))
    x1, y1, x2, y2 = box_from_map(center_gaussian((301, 501))[None])[0].tolist()
    assert abs(x2 / 501 - 0.5 - reach) < 1 / 501
    assert abs(y2 / 301 - 0.5 - reach) < 1 / 301
    assert (x1, y1) == (501 - x2, 301 - y2)


@pytest.mark.parametrize(
    "arguments", [((0, 4), 0.25), ((4,), 0.25), ((4, 4), 0), ((4, 4), math.inf)]
)
def test_wrong_arguments_of_the_centre_are_named(arguments):
    with pytest.raises(ValueError, match="size" if arguments[1] == 0.25 else "sigma"):
        center_gaussian(*arguments)


@pytest.mark.gpu
def test_results_stay_on_the_device():
    true = [torch.tensor([[1, 0, 3, 2]], device="cuda")]
    masks = boxes_to_masks(true, (4, 4))
    assert masks_to_boxes(masks).tolist() == [[1, 0, 3, 2]]
    predicted = box_from_map(masks.float())
    assert predicted.is_cuda
    hits = best_box_iou(predicted, true)
    assert hits.is_cuda
    assert hits.tolist() == [1]
    assert in_top_k(torch.eye(3, device="cuda"), torch.arange(3, device="cuda")).all()
