"""Metrics of localisation on perfect, inverted and constant maps, by hand.

The object is 2 x 3 pixels in an image of 5 x 9.
"""

from functools import partial

import pytest
import torch

from captum_ext.metrics import (
    EnergyPointingGame,
    MaxBoxAcc,
    PointingGame,
    PxAP,
    PxIoU,
    best_box_iou,
    box_from_map,
    box_ious,
    boxes_to_masks,
    energy_pointing_game,
    in_top_k,
    mask_iou,
    masks_to_boxes,
    pixel_counts,
    pixel_iou,
    pointing_game,
    total_variation,
)

BOX = torch.tensor([[2, 1, 5, 3]])
MASK = boxes_to_masks([BOX], (5, 9))
PERFECT = MASK.float()
MAPS = {"perfect": PERFECT, "inverted": 1 - PERFECT, "constant": torch.full((1, 5, 9), 0.5)}
SHARE = 6 / 45
V2 = partial(MaxBoxAcc, (0.3, 0.5, 0.7), "all")
PUBLISHED = {"convention": "wsolevaluation"}
FIGURES = {
    "pointing game": lambda m: pointing_game(m, MASK, tolerance=0),
    "pointing game, 15 pixels": lambda m: pointing_game(m, MASK),
    "energy": lambda m: energy_pointing_game(m, MASK),
    "box, 20%": lambda m: best_box_iou(box_from_map(m), [BOX]),
    "box, at every threshold": lambda m: box_ious(m, [BOX]).unique(),
    "published box, at every threshold": lambda m: box_ious(m, [BOX], **PUBLISHED).unique(),
    "all published boxes": lambda m: box_ious(m, [BOX], "all", **PUBLISHED).unique(),
    "MaxBoxAcc": lambda m: MaxBoxAcc()(m, [BOX]),
    "MaxBoxAccV2": lambda m: V2()(m, [BOX]),
    "published MaxBoxAccV2": lambda m: V2(**PUBLISHED)(m, [BOX]),
    "PxAP": lambda m: PxAP()(m, MASK),
    "PxIoU": lambda m: PxIoU()(m, MASK),
    "mask IoU": lambda m: mask_iou(m > 0.5, MASK),
    "TV": total_variation,
    "absolute TV": lambda m: total_variation(2 * m, "absolute"),
}
figures = pytest.mark.parametrize("name", FIGURES)

# To "wsolevaluation" the object has 4 x 3 pixels, the image 9 x 5, and the hole's box 6 x 5.
BY_HAND = {
    "perfect": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 10, 20],
    "inverted": [
        *(0, 1, 0, SHARE, SHARE, 12 / 45, 12 / 30, 0, 0, 1 / 3, SHARE, SHARE, 0, 10, 20),
    ],
    "constant": [
        *(0, 0, SHARE, SHARE, SHARE, 12 / 45, 12 / 45, 0, 0, 0, SHARE, SHARE, 0, 0, 0),
    ],
}


@figures
@pytest.mark.parametrize("map_name", MAPS)
def test_perfect_inverted_and_constant_maps(name, map_name):
    result = FIGURES[name](MAPS[map_name]).double().reshape(-1).tolist()
    assert result == pytest.approx([BY_HAND[map_name][list(FIGURES).index(name)]])


@figures
def test_a_map_of_nan_raises_an_error(name):
    nothing = torch.full((1, 5, 9), torch.nan)
    if name == "mask IoU":  # NaN is not above the caller's threshold
        assert FIGURES[name](nothing).tolist() == [0]
        return
    with pytest.raises(ValueError, match="not finite"):
        FIGURES[name](nothing)


RISING = {
    "power": lambda m: m**3,
    "less": lambda m: 0.1 + 0.5 * m,
    "root": torch.sqrt,
}


@pytest.mark.parametrize("rising", RISING)
@pytest.mark.parametrize("seed", range(5))
def test_pxap_px_iou_and_the_pointing_game_depend_on_the_order_of_pixels_only(rising, seed):
    """Values must stay 0.001 apart, as thresholds do."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(2, 11, (3, 5, 9), generator=generator) / 10
    masks = torch.rand(3, 5, 9, generator=generator) < 0.4
    masks[:, 0, 0] = True
    other = RISING[rising](maps)
    for metric in (PxAP(), PxIoU(), partial(pointing_game, tolerance=0)):
        assert torch.equal(metric(other, masks), metric(maps, masks))
    logits, target = maps.flatten(1), torch.tensor([3, 20, 44])
    for k in (1, 5, 20):
        assert torch.equal(in_top_k(RISING[rising](logits), target, k), in_top_k(logits, target, k))


def test_boxes_and_energy_depend_on_shares_of_the_maximum():
    """A positive factor changes no box and no share of mass; a summand does."""
    maps = torch.zeros(1, 5, 9)
    maps[0, 1:3, 2:5] = 1
    maps[0, 3, 2:8] = 0.25
    true = [torch.tensor([[2, 1, 8, 4]])]
    for factor in (1, 0.5, 2**-10):
        ious = box_ious(factor * maps, true)[0]
        assert ious.tolist() == pytest.approx([1] * 250 + [6 / 18] * 750)
        assert box_from_map(factor * maps).tolist() == [[2, 1, 8, 4]]
        assert energy_pointing_game(factor * maps, MASK).item() == pytest.approx(6 / 7.5)
    raised = 0.25 + 0.75 * maps
    assert box_from_map(raised).tolist() == [[0, 0, 9, 5]]
    assert energy_pointing_game(raised, MASK).item() < 0.4


# --- the truth -----------------------------------------------------------------------------------


def test_images_without_an_object_raise_an_error_or_give_nan():
    nothing = torch.zeros_like(MASK)
    for call in (pointing_game, energy_pointing_game):
        with pytest.raises(ValueError, match="empty"):
            call(PERFECT, nothing)
    no_box = [torch.zeros(0, 4)]
    for convention in ("components", "wsolevaluation"):
        with pytest.raises(ValueError, match=r"`boxes`.*at least 1"):
            box_ious(PERFECT, no_box, convention=convention)
        with pytest.raises(ValueError, match=r"`boxes`.*at least 1"):
            MaxBoxAcc(convention=convention).update(PERFECT, no_box)
    with pytest.raises(ValueError, match=r"`true`.*at least 1"):
        best_box_iou(BOX, no_box)
    metric = PxAP()
    metric.update(PERFECT, nothing)
    assert metric.compute().isnan()
    # With another image's object, all pixels in the empty image are false positives.
    metric.update(PERFECT, MASK)
    assert metric.compute().item() == pytest.approx(1 / 2)


def test_metrics_of_images_with_several_boxes():
    """The pointing game takes the nearest box, energy all of them, and the IoU the best."""
    two = torch.cat((BOX, torch.tensor([[7, 4, 9, 5]])))
    masks = boxes_to_masks([two], (5, 9))
    assert masks.sum() == 8
    left, right = torch.zeros(2, 1, 5, 9)
    left[0, 0, 0] = left[0, 1, 2] = right[0, 4, 8] = 1
    left[0, 0, 0] = 0.5
    assert pointing_game(torch.cat((left, right)), masks.repeat(2, 1, 1), 0).tolist() == [True] * 2
    assert pointing_game(right, MASK, 0).tolist() == [False]
    assert energy_pointing_game(left + right, masks).item() == pytest.approx(2 / 2.5)
    for convention in ("components", "wsolevaluation"):
        for contours in ("largest", "all"):
            assert (box_ious(PERFECT, [two.flip(0)], contours, convention) == 1).all()
    assert box_ious(boxes_to_masks([two[1:]], (5, 9)).float(), [two]).unique().tolist() == [1]
    assert best_box_iou(two[1:], [two]).tolist() == [1]


def test_boxes_may_reach_out_of_the_image():
    """Masks are cut off at the border; boxes keep their whole area."""
    out, far = torch.tensor([[2, 1, 5, 7]]), torch.tensor([[20, 20, 30, 30]])
    assert boxes_to_masks([out], (5, 9)).sum() == 3 * 4
    assert masks_to_boxes(boxes_to_masks([out], (5, 9))).tolist() == [[2, 1, 5, 5]]
    assert boxes_to_masks([far], (5, 9)).sum() == 0
    with pytest.raises(ValueError, match="empty"):
        pointing_game(PERFECT, boxes_to_masks([far], (5, 9)))
    assert box_ious(PERFECT, [out]).unique().tolist() == pytest.approx([6 / 18])
    assert box_ious(PERFECT, [out], **PUBLISHED).unique().tolist() == pytest.approx([12 / 28])
    assert best_box_iou(BOX, [out]).tolist() == pytest.approx([6 / 18])
    for convention in ("components", "wsolevaluation"):
        assert (box_ious(MAPS["constant"], [far], "all", convention) == 0).all()
    assert best_box_iou(BOX, [far]).tolist() == [0]


def test_maps_of_another_size_than_their_masks_raise_an_error():
    small = PERFECT[:, :4]
    for call in (pointing_game, energy_pointing_game, pixel_counts, pixel_iou, PxAP(), PxIoU()):
        with pytest.raises(ValueError, match="must agree"):
            call(small, MASK)
    with pytest.raises(ValueError, match="must agree"):
        mask_iou(small > 0, MASK)
    with pytest.raises(ValueError, match="2 images"):
        box_ious(PERFECT.repeat(2, 1, 1), [BOX])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_batches_without_an_image_give_empty_results_or_nan():
    maps, masks = torch.zeros(0, 5, 9), torch.zeros(0, 5, 9, dtype=torch.bool)
    assert box_ious(maps, []).shape == (0, 1000)
    assert pixel_iou(maps, masks).shape == (0, 1001)
    assert box_from_map(maps).shape == masks_to_boxes(masks).shape == (0, 4)
    for result in (
        pointing_game(maps, masks),
        energy_pointing_game(maps, masks),
        mask_iou(masks, masks),
        total_variation(maps),
        best_box_iou(torch.zeros(0, 4), []),
        in_top_k(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
    ):
        assert result.shape == (0,)
    for metric in (PxAP(), PxIoU(), MaxBoxAcc(), V2(), PointingGame(), EnergyPointingGame()):
        truth = [] if isinstance(metric, MaxBoxAcc) else masks
        for _ in range(2):
            figure = metric.compute()
            figures = figure.values() if isinstance(figure, dict) else [figure]
            assert all(value.isnan() for value in figures)
            metric.update(maps, truth)


# --- torchmetrics --------------------------------------------------------------------------------


def random_batch():
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(0, 3, (6, 2), generator=generator)
    boxes = torch.cat((low, low + torch.randint(1, 6, (6, 2), generator=generator)), 1)
    masks = boxes_to_masks(list(boxes[:, None]), (5, 9))
    maps = torch.rand(6, 5, 9, generator=generator)
    maps = maps * 0.6 + 0.4 * masks * torch.rand(6, 1, 1, generator=generator).round()
    return maps, masks, list(boxes[:, None])


@pytest.mark.parametrize(
    ("metric", "function"),
    [
        (partial(PointingGame, 0), lambda m, t, b: pointing_game(m, t, 0).float().mean()),
        (EnergyPointingGame, lambda m, t, b: energy_pointing_game(m, t).mean()),
        (MaxBoxAcc, lambda m, t, b: (box_ious(m, b) >= 0.5).float().mean(0).amax()),
        (
            V2,
            lambda m, t, b: sum(
                (box_ious(m, b, "all") >= delta).float().mean(0).amax() / 3
                for delta in (0.3, 0.5, 0.7)
            ),
        ),
        (
            PxIoU,
            lambda m, t, b: pixel_iou(m.reshape(1, 30, 9), t.reshape(1, 30, 9)).amax(),
        ),
        (PxAP, lambda m, t, b: PxAP()(m.reshape(1, 30, 9), t.reshape(1, 30, 9))),
    ],
)
def test_classes_over_batches_and_processes_equal_their_function_of_all_images(metric, function):
    maps, masks, boxes = random_batch()
    by_box = isinstance(metric(), MaxBoxAcc)
    expected = function(maps, masks, boxes).item()
    assert 0 < expected < 1
    ranks = [metric(), metric()]
    for i, part in enumerate((slice(0, 1), slice(1, 4), slice(4, 6))):
        ranks[i % 2].update(maps[part], boxes[part] if by_box else masks[part])
    ranks[0].merge_state(ranks[1])
    figure = ranks[0].compute()
    figure = figure["all"] if isinstance(figure, dict) else figure
    assert figure.dtype == torch.float32
    assert figure.item() == pytest.approx(expected)


def test_hits_are_counted_beyond_the_range_of_float32():
    """A float32 cannot count beyond 2**24."""
    metric = PointingGame(tolerance=0)
    metric.update(PERFECT, MASK)
    metric.total *= 2**24
    metric.count *= 2**24
    metric.update(PERFECT, MASK)
    assert metric.total[0].item() == metric.count[0].item() == 2**24 + 1


@pytest.mark.gpu
@figures
def test_results_on_a_gpu_equal_those_on_the_cpu(name, monkeypatch):
    on_cpu = [FIGURES[name](maps) for maps in MAPS.values()]
    monkeypatch.setitem(globals(), "MASK", MASK.cuda())
    monkeypatch.setitem(globals(), "BOX", BOX.cuda())
    on_gpu = [FIGURES[name](maps.cuda()) for maps in MAPS.values()]
    for result, expected in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(result.cpu(), expected)
        assert result.is_cuda or "MaxBoxAcc" in name or "Px" in name  # on the metric's own device
