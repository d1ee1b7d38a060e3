import math
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from captum_ext.metrics import (
    EnergyPointingGame,
    PointingGame,
    boxes_to_masks,
    energy_pointing_game,
    pointing_game,
)


def peak(y: int, x: int, size: tuple[int, int] = (60, 80)) -> Tensor:
    """A map (1, H, W) with its maximum at (y, x)."""
    values = torch.zeros(1, *size)
    values[0, y, x] = 1
    return values


def square(size: tuple[int, int] = (60, 80)) -> Tensor:
    """A mask (1, H, W) of rows 20 to 29 and columns 30 to 39."""
    return boxes_to_masks([torch.tensor([[30, 20, 40, 30]])], size)


# --- the pointing game ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "distance"),
    [
        ((25, 54), 15),  # the mask's last column is 39
        ((25, 53), 14),
        ((44, 35), 15),
        ((5, 35), 15),
        ((25, 15), 15),
        ((38, 51), 15),  # 9 below, 12 to the right
        ((10, 20), math.sqrt(200)),
        ((25, 35), 0),
    ],
)
def test_a_hit_is_nearer_than_the_tolerance(point: tuple[int, int], distance: float) -> None:
    attributions, mask = peak(*point), square()
    assert pointing_game(attributions, mask).tolist() == [distance < 15]
    assert pointing_game(attributions, mask, distance).tolist() == [distance == 0]
    assert pointing_game(attributions, mask, distance + 0.01).tolist() == [True]


def test_without_tolerance_the_point_is_in_the_mask() -> None:
    mask = square()
    hits = [
        [y, x]
        for y in range(18, 32)
        for x in range(28, 42)
        if pointing_game(peak(y, x), mask, tolerance=0)
    ]
    assert hits == mask[0].nonzero().tolist()


def test_the_tolerance_is_to_the_mask_and_not_to_its_box() -> None:
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    mask[0, 10, 10] = mask[0, 50, 70] = True
    assert not pointing_game(peak(30, 40), mask)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_flat_map_points_nowhere(value: float) -> None:
    everything = torch.ones(1, 4, 4, dtype=torch.bool)
    assert not pointing_game(torch.full((1, 4, 4), value), everything)


def test_of_several_maxima_the_first_in_row_major_order_counts() -> None:
    attributions = torch.zeros(1, 60, 80)
    attributions[0, 2, 70] = attributions[0, 25, 35] = 1
    assert not pointing_game(attributions, square())
    assert pointing_game(attributions.flip(1, 2), square().flip(1, 2))


def test_a_negative_map_points_at_its_least_negative_value() -> None:
    assert pointing_game(peak(25, 35) - 5, square())


def test_equal_channels_count_once_and_others_are_summed() -> None:
    # A value and its successor may have the same sum over three channels, by rounding.
    low = torch.tensor(1.0)
    high = torch.nextafter(low, torch.tensor(2.0))
    attributions = torch.stack((low, high)).reshape(1, 1, 1, 2)
    mask = torch.tensor([[[False, True]]])
    assert pointing_game(attributions.repeat(1, 3, 1, 1), mask, 0)
    different = torch.tensor([[[[5.0, 3.0]], [[-3.0, 1.0]]]])
    assert pointing_game(different, mask, 0)
    assert energy_pointing_game(different, mask).item() == pytest.approx(4 / 6)
    signed = torch.tensor([[[[-1.0, 1.0]]]]).repeat(1, 3, 1, 1)
    assert energy_pointing_game(signed, mask).item() == 1


def test_a_batch_equals_its_examples() -> None:
    attributions = torch.randn(7, 3, 9, 11)
    attributions[3] = attributions[3, :1]
    masks = torch.rand(7, 9, 11) < 0.1
    masks[:, 0, 0] = True
    singles = [pointing_game(a[None], m[None], 2) for a, m in zip(attributions, masks, strict=True)]
    assert pointing_game(attributions, masks, 2).tolist() == torch.cat(singles).tolist()
    assert len(set(torch.cat(singles).tolist())) == 2
    shares = [
        energy_pointing_game(a[None], m[None]) for a, m in zip(attributions, masks, strict=True)
    ]
    assert energy_pointing_game(attributions, masks[:, None]).tolist() == pytest.approx(
        torch.cat(shares).tolist()
    )


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    tolerance=st.floats(0, 6),
    seed=st.integers(0, 10**6),
)
def test_both_games_equal_a_search_over_all_pixels(
    height: int, width: int, tolerance: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    attributions = torch.randint(0, 4, (3, height, width), generator=generator).float()
    masks = torch.rand(3, height, width, generator=generator) < 0.3
    masks[:, -1, -1] = True
    for values, mask, hit, share in zip(
        attributions,
        masks,
        pointing_game(attributions, masks, tolerance),
        energy_pointing_game(attributions, masks),
        strict=True,
    ):
        cells = [(values[y, x].item(), -y, -x) for y in range(height) for x in range(width)]
        _, y, x = max(cells)
        distances = [math.dist((-y, -x), cell) for cell in mask.nonzero().tolist()]
        near = min(distances) < tolerance or min(distances) == 0
        assert bool(hit) == (near and len({value for value, *_ in cells}) > 1)
        mass = values.sum().item()
        assert share.item() == pytest.approx(values[mask].sum().item() / mass if mass else 0)


# --- mass ----------------------------------------------------------------------------------------


def test_the_share_of_positive_mass_by_hand() -> None:
    attributions = torch.tensor([[[1.0, -9.0], [3.0, 4.0]]])
    mask = torch.tensor([[[True, True], [False, True]]])
    assert energy_pointing_game(attributions, mask).item() == pytest.approx(5 / 8)


def test_without_positive_mass_the_share_is_zero() -> None:
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    attributions = torch.stack((torch.zeros(3, 3), -torch.rand(3, 3)))
    assert energy_pointing_game(attributions, mask).tolist() == [0, 0]


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e37])
def test_the_scale_of_a_map_does_not_matter(scale: float) -> None:
    attributions = torch.tensor([[[1.0, 0.0, 2.0, 5.0]]]) * scale
    mask = torch.tensor([[[False, True, True, False]]])
    assert energy_pointing_game(attributions, mask).item() == pytest.approx(1 / 4, rel=1e-2)
    assert not pointing_game(attributions, mask, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_in_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    attributions = torch.full((1, 3, 400, 400), 30.0, dtype=dtype)
    attributions[..., 100:, :] = 10
    attributions[0, 0, 0, 0] = 31
    mask = torch.zeros(1, 400, 400, dtype=torch.bool)
    mask[:, :100] = True
    assert energy_pointing_game(attributions, mask).item() == pytest.approx(1 / 2, abs=1e-5)
    assert pointing_game(attributions, mask, 0)


def test_maps_may_be_integers() -> None:
    attributions = torch.tensor([[[0, 3, 1]]], dtype=torch.uint8)
    mask = torch.tensor([[[False, True, False]]])
    assert pointing_game(attributions, mask, 0)
    assert energy_pointing_game(attributions, mask).item() == 0.75


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize("call", [pointing_game, energy_pointing_game])
def test_wrong_arguments_are_named(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = torch.rand(2, 3, 4, 5)
        broken[1, 2, 3, 4] = value
        with pytest.raises(ValueError, match="`attributions` has values that are not finite"):
            call(broken, mask)
    empty = mask.clone()
    empty[1] = False
    with pytest.raises(ValueError, match=r"`masks` \[1\] are empty"):
        call(torch.rand(2, 4, 5), empty)
    for attributions, masks in (
        (torch.rand(2, 5, 4), mask),
        (torch.rand(1, 4, 5), mask),
        (torch.rand(2, 4, 5), mask[0][None]),
    ):
        with pytest.raises(ValueError, match="must agree"):
            call(attributions, masks)
    with pytest.raises(ValueError, match="`attributions` must be"):
        call(torch.rand(4, 5), mask)
    with pytest.raises(ValueError, match="`masks` must be"):
        call(torch.rand(2, 4, 5), mask[:, None].repeat(1, 3, 1, 1))
    with pytest.raises(TypeError, match="`masks` must be bool"):
        call(torch.rand(2, 4, 5), mask.float())


@pytest.mark.parametrize("tolerance", [-1, float("nan"), float("inf")])
def test_a_wrong_tolerance_is_named(tolerance: float) -> None:
    with pytest.raises(ValueError, match="`tolerance`"):
        pointing_game(peak(0, 0), square(), tolerance)
    with pytest.raises(ValueError, match="`tolerance`"):
        PointingGame(tolerance)


# --- torchmetrics --------------------------------------------------------------------------------


def labelled_examples() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Six examples of classes 0, 0, 0, 2, 2, 1: hits 1, 1, 0, 0, 1, 0."""
    inside, outside = peak(25, 35), peak(0, 0)
    attributions = torch.cat((inside, inside, outside, outside, inside, outside))
    masks = square().repeat(6, 1, 1)
    difficult = torch.tensor([False, True, True, False, True, False])
    return attributions, masks, torch.tensor([0, 0, 0, 2, 2, 1]), difficult


@pytest.mark.parametrize(
    ("average", "everything", "difficult"),
    [
        ("micro", 3 / 6, 2 / 3),
        ("macro", (2 / 3 + 0 + 1 / 2) / 3, (1 / 2 + 1) / 2),
        ("none", [2 / 3, 0, 1 / 2, math.nan], [1 / 2, math.nan, 1, math.nan]),
    ],
)
def test_averages_over_batches_by_hand(average: str, everything: object, difficult: object) -> None:
    metric = PointingGame(num_classes=4, average=average)
    batch = labelled_examples()
    for part in (slice(0, 2), slice(2, 6)):
        metric.update(*(t[part] for t in batch))
    computed = metric.compute()
    assert computed["all"].tolist() == pytest.approx(everything, nan_ok=True)
    assert computed["difficult"].tolist() == pytest.approx(difficult, nan_ok=True)
    # `forward` returns the means of the batch alone, and adds the batch to the states.
    again = PointingGame(num_classes=4, average=average)
    for part in (slice(0, 2), slice(2, 6)):
        value = again(*(t[part] for t in batch))
    assert not torch.equal(value["all"], computed["all"])
    for key, kept in again.compute().items():
        torch.testing.assert_close(kept, computed[key], equal_nan=True)


def test_without_classes_the_mean_is_over_examples() -> None:
    metric = PointingGame()
    attributions, masks, *_ = labelled_examples()
    metric.update(attributions, masks)
    assert metric.compute()["all"].item() == 0.5
    assert metric.compute()["difficult"].isnan()
    metric.reset()
    metric.update(attributions[:2], masks[:2])
    assert metric.compute()["all"].item() == 1


def test_the_class_passes_its_tolerance_on() -> None:
    metric = PointingGame(tolerance=0)
    metric.update(peak(25, 42), square())
    assert metric.compute()["all"].item() == 0
    metric = PointingGame(tolerance=4)
    metric.update(peak(25, 42), square())
    assert metric.compute()["all"].item() == 1


def test_the_mean_share_of_mass() -> None:
    metric = EnergyPointingGame(num_classes=2, average="macro")
    attributions = torch.tensor([[[3.0, 1.0]], [[1.0, 1.0]], [[0.0, 1.0]]])
    masks = torch.tensor([[[True, False]]]).repeat(3, 1, 1)
    metric.update(attributions, masks, torch.tensor([0, 0, 1]), torch.tensor([True, False, False]))
    assert metric.compute()["all"].item() == pytest.approx((0.625 + 0) / 2)
    assert metric.compute()["difficult"].item() == pytest.approx(0.75)


def test_empty_masks_raise_an_error_or_are_left_out() -> None:
    attributions, masks, target, difficult = labelled_examples()
    masks[2] = False  # a miss; Quantus would count a hit
    with pytest.raises(ValueError, match=r"`masks` \[2\] are empty"):
        PointingGame().update(attributions, masks)
    metric = PointingGame(num_classes=3, ignore_empty=True)
    metric.update(attributions, masks, target, difficult)
    assert metric.compute()["all"].item() == pytest.approx(3 / 5)
    assert metric.compute()["difficult"].item() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = PointingGame(ignore_empty=True)
        metric.update(attributions[2:3], masks[2:3])
        assert metric.compute()["all"].isnan()


def test_wrong_arguments_of_the_classes_are_named() -> None:
    with pytest.raises(ValueError, match="`average` must be one of"):
        PointingGame(average="mean")
    with pytest.raises(ValueError, match="`num_classes` must be given"):
        EnergyPointingGame(average="macro")
    with pytest.raises(ValueError, match="`num_classes` must be an integer of at least 1"):
        EnergyPointingGame(num_classes=0)
    with pytest.raises(ValueError, match=r"`num_classes` must be an integer .*got 2\.5"):
        PointingGame(num_classes=2.5, average="macro")  # type: ignore[arg-type]
    attributions, masks, target, difficult = labelled_examples()
    metric = PointingGame(num_classes=3)
    for wrong in (None, target[:2], target.float(), target + 1, target - 1):
        with pytest.raises(ValueError, match="`target` must be"):
            metric.update(attributions, masks, wrong)
    for wrong in (difficult[:2], difficult.int()):
        with pytest.raises(ValueError, match="`difficult` must be bool"):
            metric.update(attributions, masks, target, wrong)
    with pytest.raises(ValueError, match="`masks` must be 6"):
        PointingGame(ignore_empty=True).update(attributions, masks[:2])
    assert metric.count.sum() == 0


def test_states_of_two_processes_add_up() -> None:
    batch = labelled_examples()
    first, second = (PointingGame(num_classes=3, average="macro") for _ in range(2))
    first.update(*(t[:2] for t in batch))
    second.update(*(t[2:] for t in batch))
    first.merge_state(second)
    together = PointingGame(num_classes=3, average="macro")
    together.update(*batch)
    assert first.compute() == together.compute()


def test_importing_methods_does_not_import_metrics() -> None:
    code = "import sys, captum_ext.attr; print('captum_ext.metrics' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.gpu
def test_the_pointing_game_on_the_device() -> None:
    batch = [t.cuda() for t in labelled_examples()]
    metric = PointingGame(num_classes=3).cuda()
    metric.update(*batch)
    assert metric.compute()["all"].is_cuda
    assert metric.compute()["all"].item() == 0.5
    on_cpu = PointingGame(num_classes=3, ignore_empty=True)  # metrics are made on the CPU
    on_cpu.update(*batch[:2], *labelled_examples()[2:])
    assert on_cpu.compute()["all"].item() == 0.5
