"""Pixels of maps and masks, by hand and by a slow reference."""

import math

import numpy as np
import pytest
import torch

from captum_ext.metrics import PxAP, PxIoU, mask_iou, pixel_counts, pixel_iou
from captum_ext.metrics.pixels import precision_at, px_ap, px_iou_curve
from tests.metrics.by_thresholds import hard_maps


def slow_px_iou(maps, masks, ignored):
    """Straight from the definition: all pixels again at each threshold."""
    values, object_ = maps[~ignored].numpy(), masks[~ignored].numpy()
    best = 0.0
    for step in range(1001):
        found = values >= step / 1000
        union = (found | object_).sum()
        best = max(best, (found & object_).sum() / union if union else 0.0)
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


def test_by_hand():
    """Of the thresholds, 0.35 takes three pixels of the object and one beside it: 3 / 4."""
    maps = torch.tensor([[[0.9, 0.8, 0.35], [0.4, 0.1, 0.0]]])
    masks = torch.tensor([[[True, True, True], [False, False, False]]])
    metric = PxIoU()
    assert metric(maps, masks).item() == pytest.approx(3 / 4)
    assert metric.threshold().item() == pytest.approx(0.101)
    curve = metric.curve()
    for at, share in ((0, 3 / 6), (100, 3 / 5), (101, 3 / 4), (350, 3 / 4), (351, 2 / 4)):
        assert curve[at].item() == pytest.approx(share)
    for at, share in ((400, 2 / 4), (401, 2 / 3), (801, 1 / 3), (901, 0), (1000, 0)):
        assert curve[at].item() == pytest.approx(share)


def test_ignored_pixels_are_in_no_count():
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
    """Each map is perfect at a threshold of its own, and there is none for both."""
    high = torch.tensor([[[0.9, 0.9, 0.9, 0.5]]])
    low = torch.tensor([[[0.3, 0.1, 0.1, 0.1]]])
    masks = torch.tensor([[[True, True, True, False]], [[True, False, False, False]]])
    for mask, one in zip(masks, (high, low), strict=True):
        assert PxIoU()(one, mask[None]).item() == 1
    metric = PxIoU()
    metric.update(high, masks[:1])
    metric.update(low, masks[1:])
    assert metric.compute().item() == pytest.approx(4 / 5)  # at 0.2: all of both, and the 0.5
    assert metric.threshold().item() == pytest.approx(0.101)


def test_extreme_maps():
    mask = torch.zeros(1, 10, 10, dtype=torch.bool)
    mask[0, 2:5, 2:7] = True
    assert PxIoU()(mask.float(), mask).item() == 1
    assert PxIoU()(1 - mask.float(), mask).item() == pytest.approx(0.15)  # only all pixels help
    for value in (0.0, 0.4, 1.0):
        assert PxIoU()(torch.full((1, 10, 10), value), mask).item() == pytest.approx(0.15)


def test_empty_ground_truth():
    nothing = torch.zeros(1, 1, 4, dtype=torch.bool)
    maps = torch.tensor([[[0.9, 0.5, 0.2, 0.1]]])
    metric = PxIoU()
    metric.update(maps, nothing)
    assert metric.compute().isnan()
    assert metric.threshold().isnan()
    assert (pixel_iou(maps, nothing) == 0).all()
    # Beside an image with an object, what is found in one without is found wrongly.
    metric.update(maps, torch.tensor([[[True, True, False, False]]]))
    assert metric.compute().item() == pytest.approx(2 / 4)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert PxIoU().compute().isnan()


def test_random_maps_equal_the_slow_reference():
    for trial in range(30):
        maps, masks, ignored = random_case(trial)
        metric = PxIoU()
        for i in range(3):
            metric.update(maps[i : i + 1], masks[i : i + 1], ignored[i : i + 1])
        assert metric.compute().item() == pytest.approx(slow_px_iou(maps, masks, ignored))


def test_a_steeper_map_has_the_same():
    maps, masks, _ = random_case(1)
    maps = (10 * maps).round() / 10
    assert PxIoU()(maps, masks) == PxIoU()(maps**2, masks)
    assert PxIoU()(maps, masks) == PxIoU()(0.2 + 0.5 * maps, masks)


# --- PxAP ----------------------------------------------------------------------------------------


def by_hand(maps, masks):
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
    assert metric(maps, masks).item() == pytest.approx(by_hand(maps, masks), abs=1e-6)
    pieces = PxAP()
    for i in range(4):
        pieces.update(maps[i : i + 1], masks[i : i + 1])
    assert pieces.compute() == metric.compute()


@pytest.mark.parametrize("seed", range(8))
def test_pxap_of_240_maps_is_that_of_the_definition(seed):
    """With ignored pixels; the counts to the pixel."""
    random = np.random.default_rng(seed)
    together, every = PxAP(), []
    for name, image in hard_maps(seed):
        mask, ignored = random.random((2, *image.shape)) < [[[0.4]], [[0.2]]]
        mask.flat[0], ignored.flat[0] = True, False
        metric = PxAP()
        tensors = [torch.from_numpy(one)[None] for one in (image, mask, ignored)]
        metric.update(*tensors)
        together.update(*tensors)
        values, true = image[~ignored], mask[~ignored]
        every.append((values, true))
        for counts, pixels in ((metric.inside, values[true]), (metric.outside, values[~true])):
            slow = [(pixels >= tau).sum() for tau in np.arange(1001) / 1000]
            assert counts.flip(0).cumsum(0).flip(0).tolist() == slow, name
        slow = by_hand(torch.from_numpy(values), torch.from_numpy(true))
        assert metric.compute().item() == pytest.approx(slow, rel=1e-6), name
    slow = by_hand(*(torch.from_numpy(np.concatenate(one)) for one in zip(*every, strict=True)))
    assert together.compute().item() == pytest.approx(slow, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_map_has_the_share_of_the_object(value):
    masks = torch.zeros(1, 5, 8, dtype=torch.bool)
    masks[0, :3, :2] = True
    assert PxAP()(torch.full((1, 5, 8), value), masks).item() == pytest.approx(6 / 40)


def test_perfect_maps_of_any_height_and_ignored_pixels():
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


# --- of each image -------------------------------------------------------------------------------


def test_the_iou_of_each_image_is_that_of_its_mask():
    maps, masks, _ = random_case(4)
    found = pixel_iou(maps, masks)
    assert found.shape == (3, 1001)
    for step in (0, 1, 250, 500, 777, 1000):
        assert torch.allclose(found[:, step], mask_iou(maps >= step / 1000, masks))


def test_counts_are_those_of_numpys_histogram():
    maps, masks, ignored = random_case(3)
    inside, outside = pixel_counts(maps, masks, ignored)
    edges = [*np.arange(1001) / 1000, 2]
    for i in range(3):
        for found, chosen in ((inside, masks), (outside, ~masks)):
            values = maps[i][chosen[i] & ~ignored[i]].numpy()
            assert found[i].tolist() == np.histogram(values, edges)[0].tolist()
    assert inside.dtype == torch.int64
    assert (inside.sum(1) + outside.sum(1)).tolist() == (~ignored).flatten(1).sum(1).tolist()


def test_counts_are_all_that_pxap_needs():
    maps, masks, ignored = random_case(3)
    metric = PxAP()
    metric.update(maps.float(), masks, ignored)
    inside, outside = (counts.sum(0) for counts in pixel_counts(maps.float(), masks, ignored))
    assert metric.inside.tolist() == inside.tolist()
    assert metric.outside.tolist() == outside.tolist()


def test_channels_masks_with_a_channel_and_half_precision():
    maps, masks, ignored = random_case(5)
    expected = pixel_iou(maps.float(), masks, ignored)
    more = maps.float()[:, None].repeat(1, 3, 1, 1)
    assert torch.equal(pixel_iou(more, masks[:, None], ignored[:, None]), expected)
    halves = (8 * maps).round() / 8
    assert torch.equal(pixel_iou(halves.half(), masks), pixel_iou(halves, masks))


@pytest.mark.parametrize("metric", [pixel_counts, pixel_iou, PxIoU(), PxAP()])
def test_bad_input(metric):
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


def test_figures_of_resamples_are_those_of_their_sums():
    """One definition for the class and for `evaluate`: with leading dimensions, in float64."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(5, 6, 7, generator=generator)
    masks = torch.rand(5, 6, 7, generator=generator) < 0.3
    masks[4] = False
    counts = [t.double() for t in pixel_counts(maps, masks)]
    weights = torch.randint(0, 3, (8, 5), generator=generator).double()
    weights[0], weights[1] = 1, torch.tensor([0, 0, 0, 0, 2])  # all once; one without an object
    inside, outside = (weights @ t for t in counts)
    for i, row in enumerate(weights.long()):
        ap, iou = PxAP(), PxIoU()
        for image in range(5):
            for _ in range(row[image]):
                ap.update(maps[image : image + 1], masks[image : image + 1])
                iou.update(maps[image : image + 1], masks[image : image + 1])
        for found, metric in (
            (px_ap(inside, outside)[i], ap),
            (px_iou_curve(inside, outside)[i].amax(), iou),
        ):
            assert torch.equal(found.float().isnan(), metric.compute().isnan())
            assert found.isnan() == (i == 1)
            assert found.isnan() or found.float() == metric.compute()
    # At a recall that a threshold has, precision is that of the highest threshold which has it.
    tp, fp = (t.flip(-1).cumsum(-1)[0] for t in (inside, outside))
    recalls = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    found = precision_at(inside, outside, recalls)[0]
    for value, recall in zip(found.tolist(), recalls.tolist(), strict=True):
        first = next(j for j in range(1001) if tp[j] > 0 and tp[j] / tp[-1] >= recall)
        assert value == (tp[first] / (tp[first] + fp[first])).item()
