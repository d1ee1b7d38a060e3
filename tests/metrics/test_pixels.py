"""PxAP and PxIoU, by hand and against a slow reference."""

import math

import numpy as np
import pytest
import torch

from captum_ext.metrics import PxAP, PxIoU, mask_iou, pixel_counts, pixel_iou
from captum_ext.metrics.pixels import precision_at, px_ap, px_iou_curve
from tests.metrics.by_thresholds import hard_maps


def reference_px_iou(maps, masks, ignored):
    """PxIoU by its definition, which compares all pixels at each threshold."""
    values, true = maps[~ignored].numpy(), masks[~ignored].numpy()
    best = 0.0
    for step in range(1001):
        predicted = values >= step / 1000
        union = (predicted | true).sum()
        best = max(best, (predicted & true).sum() / union if union else 0.0)
    return best


def random_case(trial, shape=(3, 9, 7)):
    generator = torch.Generator().manual_seed(trial)
    maps = torch.rand(shape, generator=generator, dtype=torch.float64)
    if trial % 3 == 0:  # values that are thresholds
        maps = torch.randint(0, 11, shape, generator=generator).double() / 10
    masks = torch.rand(shape, generator=generator) < maps * 0.6
    ignored = torch.rand(shape, generator=generator) < 0.2
    return maps, masks, ignored


# --- PxIoU ---------------------------------------------------------------------------------------


def test_px_iou_by_hand():
    """The best threshold, 0.35, takes three pixels of the object and one beside it: 3 / 4."""
    maps = torch.tensor([[[0.9, 0.8, 0.35], [0.4, 0.1, 0.0]]])
    masks = torch.tensor([[[True, True, True], [False, False, False]]])
    metric = PxIoU()
    assert metric(maps, masks).item() == pytest.approx(3 / 4)
    assert metric.threshold().item() == pytest.approx(0.101)
    curve = metric.curve()
    for step, share in ((0, 3 / 6), (100, 3 / 5), (101, 3 / 4), (350, 3 / 4), (351, 2 / 4)):
        assert curve[step].item() == pytest.approx(share)
    for step, share in ((400, 2 / 4), (401, 2 / 3), (801, 1 / 3), (901, 0), (1000, 0)):
        assert curve[step].item() == pytest.approx(share)


def test_ignored_pixels_are_not_counted():
    maps = torch.tensor([[[0.9, 0.8, 0.35], [0.4, 0.1, 0.0]]])
    masks = torch.tensor([[[True, True, True], [False, False, False]]])
    ignored = torch.tensor([[[False, True, False], [True, False, False]]])
    metric = PxIoU()
    assert metric(maps, masks, ignored).item() == 1
    assert metric.curve()[0].item() == pytest.approx(2 / 4)
    assert metric.curve()[351].item() == pytest.approx(1 / 2)
    everything = torch.ones_like(masks)
    assert PxIoU()(maps, masks, everything).isnan()
    assert (pixel_iou(maps, masks, everything) == 0).all()


def test_one_threshold_serves_all_images_and_pixels_are_pooled():
    """Each map has a perfect threshold, but both have none in common."""
    high = torch.tensor([[[0.9, 0.9, 0.9, 0.5]]])
    low = torch.tensor([[[0.3, 0.1, 0.1, 0.1]]])
    masks = torch.tensor([[[True, True, True, False]], [[True, False, False, False]]])
    for mask, maps in zip(masks, (high, low), strict=True):
        assert PxIoU()(maps, mask[None]).item() == 1
    metric = PxIoU()
    metric.update(high, masks[:1])
    metric.update(low, masks[1:])
    assert metric.compute().item() == pytest.approx(4 / 5)  # 0.2 takes both objects and the 0.5
    assert metric.threshold().item() == pytest.approx(0.101)


def test_px_iou_of_perfect_inverted_and_constant_maps():
    mask = torch.zeros(1, 10, 10, dtype=torch.bool)
    mask[0, 2:5, 2:7] = True
    assert PxIoU()(mask.float(), mask).item() == 1
    assert PxIoU()(1 - mask.float(), mask).item() == pytest.approx(
        0.15
    )  # at threshold 0, with all pixels
    for value in (0.0, 0.4, 1.0):
        assert PxIoU()(torch.full((1, 10, 10), value), mask).item() == pytest.approx(0.15)


def test_px_iou_needs_an_object_in_some_image():
    nothing = torch.zeros(1, 1, 4, dtype=torch.bool)
    maps = torch.tensor([[[0.9, 0.5, 0.2, 0.1]]])
    metric = PxIoU()
    metric.update(maps, nothing)
    assert metric.compute().isnan()
    assert metric.threshold().isnan()
    assert (pixel_iou(maps, nothing) == 0).all()
    # With another image's object, all pixels in the empty image are false positives.
    metric.update(maps, torch.tensor([[[True, True, False, False]]]))
    assert metric.compute().item() == pytest.approx(2 / 4)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert PxIoU().compute().isnan()


def test_px_iou_of_random_maps_equals_the_reference():
    for trial in range(30):
        maps, masks, ignored = random_case(trial)
        metric = PxIoU()
        for i in range(3):
            metric.update(maps[i : i + 1], masks[i : i + 1], ignored[i : i + 1])
        assert metric.compute().item() == pytest.approx(reference_px_iou(maps, masks, ignored))


def test_px_iou_depends_on_the_order_of_pixels_only():
    maps, masks, _ = random_case(1)
    maps = (10 * maps).round() / 10
    assert PxIoU()(maps, masks) == PxIoU()(maps**2, masks)
    assert PxIoU()(maps, masks) == PxIoU()(0.2 + 0.5 * maps, masks)


# --- PxAP ----------------------------------------------------------------------------------------


def reference_ap(maps, masks):
    """Average precision over the thresholds, pixel by pixel."""
    maps, masks = maps.flatten().double().numpy(), masks.flatten().numpy()
    edges = np.arange(1001) / 1000
    precision, recall = [], []
    for tau in edges[::-1]:
        chosen = maps >= tau
        tp = (chosen & masks).sum()
        precision.append(tp / chosen.sum() if chosen.any() else 0)
        recall.append(tp / masks.sum())
    return float(np.sum(np.array(precision) * np.diff(recall, prepend=0)))


def test_pxap_by_hand():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(4, 9, 11, generator=generator).double()
    masks = torch.rand(4, 9, 11, generator=generator) < 0.2 + 0.5 * maps
    metric = PxAP()
    assert metric(maps, masks).item() == pytest.approx(reference_ap(maps, masks), abs=1e-6)
    pieces = PxAP()
    for i in range(4):
        pieces.update(maps[i : i + 1], masks[i : i + 1])
    assert pieces.compute() == metric.compute()


@pytest.mark.parametrize("seed", range(8))
def test_pxap_of_240_maps_equals_the_reference(seed):
    """The counts, without ignored pixels, are exact."""
    random = np.random.default_rng(seed)
    together, pairs = PxAP(), []
    for name, index in hard_maps(seed):
        mask, ignored = random.random((2, *index.shape)) < [[[0.4]], [[0.2]]]
        mask.flat[0], ignored.flat[0] = True, False
        metric = PxAP()
        tensors = [torch.from_numpy(array)[None] for array in (index, mask, ignored)]
        metric.update(*tensors)
        together.update(*tensors)
        values, true = index[~ignored], mask[~ignored]
        pairs.append((values, true))
        for counts, pixels in ((metric.inside, values[true]), (metric.outside, values[~true])):
            expected = [(pixels >= tau).sum() for tau in np.arange(1001) / 1000]
            assert counts.flip(0).cumsum(0).flip(0).tolist() == expected, name
        expected = reference_ap(torch.from_numpy(values), torch.from_numpy(true))
        assert metric.compute().item() == pytest.approx(expected, rel=1e-6), name
    expected = reference_ap(
        *(torch.from_numpy(np.concatenate(array)) for array in zip(*pairs, strict=True))
    )
    assert together.compute().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_map_has_the_share_of_the_object(value):
    masks = torch.zeros(1, 5, 8, dtype=torch.bool)
    masks[0, :3, :2] = True
    assert PxAP()(torch.full((1, 5, 8), value), masks).item() == pytest.approx(6 / 40)


def test_pxap_is_1_for_perfect_maps_of_any_height_and_without_ignored_pixels():
    masks = torch.zeros(2, 6, 6, dtype=torch.bool)
    masks[:, 1:4, 2:5] = True
    maps = masks * torch.tensor([1.0, 0.4])[:, None, None]
    assert PxAP()(maps, masks) == 1
    false = maps.clone()
    false[:, 0] = 1
    assert PxAP()(false, masks) < 0.8
    ignored = torch.zeros_like(masks)
    ignored[:, 0] = True
    metric = PxAP()
    metric.update(false, masks, ignored)
    assert metric.compute() == 1
    assert math.isnan(PxAP().compute())


# --- figures of each image -----------------------------------------------------------------------


def test_pixel_iou_equals_mask_iou_at_each_threshold():
    maps, masks, _ = random_case(4)
    ious = pixel_iou(maps, masks)
    assert ious.shape == (3, 1001)
    for step in (0, 1, 250, 500, 777, 1000):
        assert torch.allclose(ious[:, step], mask_iou(maps >= step / 1000, masks))


def test_pixel_counts_equal_numpys_histogram():
    maps, masks, ignored = random_case(3)
    inside, outside = pixel_counts(maps, masks, ignored)
    edges = [*np.arange(1001) / 1000, 2]
    for i in range(3):
        for counts, region in ((inside, masks), (outside, ~masks)):
            values = maps[i][region[i] & ~ignored[i]].numpy()
            assert counts[i].tolist() == np.histogram(values, edges)[0].tolist()
    assert inside.dtype == torch.int64
    assert (inside.sum(1) + outside.sum(1)).tolist() == (~ignored).flatten(1).sum(1).tolist()


def test_pxap_sums_the_pixel_counts():
    maps, masks, ignored = random_case(3)
    metric = PxAP()
    metric.update(maps.float(), masks, ignored)
    inside, outside = (counts.sum(0) for counts in pixel_counts(maps.float(), masks, ignored))
    assert metric.inside.tolist() == inside.tolist()
    assert metric.outside.tolist() == outside.tolist()


def test_equal_channels_masks_with_a_channel_and_half_precision_change_nothing():
    maps, masks, ignored = random_case(5)
    expected = pixel_iou(maps.float(), masks, ignored)
    repeated = maps.float()[:, None].repeat(1, 3, 1, 1)
    assert torch.equal(pixel_iou(repeated, masks[:, None], ignored[:, None]), expected)
    halves = (8 * maps).round() / 8
    assert torch.equal(pixel_iou(halves.half(), masks), pixel_iou(halves, masks))


@pytest.mark.parametrize("metric", [pixel_counts, pixel_iou, PxIoU(), PxAP()])
def test_wrong_inputs_are_named(metric):
    maps, masks = torch.rand(2, 4, 5), torch.ones(2, 4, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"maps.*not finite"):
        metric(torch.full_like(maps, math.nan), masks)
    for outside in (maps + 1, maps - 1):
        with pytest.raises(ValueError, match=r"maps.*\[0, 1\].*min_max"):
            metric(outside, masks)
    with pytest.raises(ValueError, match=r"maps.*\(2, 4, 5\).*masks.*\(2, 5, 4\)"):
        metric(maps, masks.mT)
    with pytest.raises(ValueError, match="ignored"):
        metric(maps, masks, masks[:1])
    with pytest.raises(TypeError, match=r"masks.*bool"):
        metric(maps, masks.float())
    with pytest.raises(TypeError, match=r"ignored.*bool"):
        metric(maps, masks, masks.float())


def test_figures_of_weighted_sums_equal_those_of_repeated_images():
    """`evaluate` resamples images by weighted sums, with leading dimensions, in float64."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(5, 6, 7, generator=generator)
    masks = torch.rand(5, 6, 7, generator=generator) < 0.3
    masks[4] = False
    counts = [t.double() for t in pixel_counts(maps, masks)]
    weights = torch.randint(0, 3, (8, 5), generator=generator).double()
    weights[0], weights[1] = (
        1,
        torch.tensor([0, 0, 0, 0, 2]),
    )  # all images once; two times the one without an object
    inside, outside = (weights @ t for t in counts)
    for i, row in enumerate(weights.long()):
        ap, iou = PxAP(), PxIoU()
        for index in range(5):
            for _ in range(row[index]):
                ap.update(maps[index : index + 1], masks[index : index + 1])
                iou.update(maps[index : index + 1], masks[index : index + 1])
        for figure, metric in (
            (px_ap(inside, outside)[i], ap),
            (px_iou_curve(inside, outside)[i].amax(), iou),
        ):
            assert torch.equal(figure.float().isnan(), metric.compute().isnan())
            assert figure.isnan() == (i == 1)
            assert figure.isnan() or figure.float() == metric.compute()
    # The precision at a recall is that of the highest threshold which reaches the recall.
    tp, fp = (t.flip(-1).cumsum(-1)[0] for t in (inside, outside))
    recalls = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    precisions = precision_at(inside, outside, recalls)[0]
    for precision, recall in zip(precisions.tolist(), recalls.tolist(), strict=True):
        first = next(j for j in range(1001) if tp[j] > 0 and tp[j] / tp[-1] >= recall)
        assert precision == (tp[first] / (tp[first] + fp[first])).item()
