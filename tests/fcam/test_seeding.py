"""Seeds, compared with skimage's Otsu and scipy's morphology; and seeds of degenerate maps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from skimage.filters import threshold_otsu

from captum_ext.fcam import SeedSampler, otsu
from captum_ext.fcam.seeding import erosion_size
from captum_ext.imaging import min_max, resize


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def coarse(n=3, size=(40, 56), seed=0):
    return min_max(resize(torch.rand(n, 1, 5, 7, generator=seeded(seed)), size))


def levels_of(maps):
    return (255 * maps.flatten(1)).floor().long()


# --- Otsu ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 255), min_size=2, max_size=60))
def test_otsu_equals_that_of_skimage(values):
    result = int(otsu(torch.tensor([values])))
    if len(set(values)) == 1:
        assert result == 0
        return
    theirs = int(threshold_otsu(np.array(values, np.uint8)))
    if result != theirs:  # equal maxima, which rounding makes unequal in skimage
        assert spread(values, result) == pytest.approx(spread(values, theirs), rel=1e-12)
        assert result < theirs or spread(values, result) >= spread(values, theirs)


def spread(values, t):
    """The variance between classes, computed by hand."""
    values = np.array(values, float)
    low, high = values[values <= t], values[values > t]
    if not len(low) or not len(high):
        return 0.0
    return len(low) * len(high) * (low.mean() - high.mean()) ** 2


def test_otsu_of_maps_and_of_few_levels_has_known_thresholds():
    maps = coarse(20, (61, 43))
    theirs = [threshold_otsu(image.astype(np.uint8)) for image in levels_of(maps).numpy()]
    assert otsu(levels_of(maps)).tolist() == theirs
    assert otsu(torch.tensor([[0, 1, 1, 0]])).tolist() == [0]
    assert otsu(torch.tensor([[7, 7, 200, 200]])).tolist() == [7]
    assert otsu(torch.tensor([[3, 3, 3, 3], [0, 0, 0, 0]])).tolist() == [0, 0]


# --- regions -------------------------------------------------------------------------------------


def test_regions_equal_those_found_by_hand():
    maps = coarse()
    sampler = SeedSampler(n_minus=0.2, erosion=5)
    foreground, background = sampler.regions(maps, torch.rand(3, 40 * 56, generator=seeded()))
    for i in range(3):
        image = levels_of(maps)[i].reshape(40, 56).numpy()
        region = image > threshold_otsu(image.astype(np.uint8))
        eroded = ndimage.binary_erosion(region, np.ones((5, 5)), border_value=1)
        assert 0 < eroded.sum() < region.sum()
        assert (foreground[i].reshape(40, 56).numpy() == eroded).all()
        values = maps[i].flatten()
        assert background[i].sum() == int(0.2 * 40 * 56)
        assert values[background[i]].max() <= values[~background[i]].min()


def test_a_region_that_would_vanish_is_not_eroded():
    maps = torch.zeros(2, 1, 20, 20)
    maps[0, 0, 4:7, 4:7] = 1  # smaller than the kernel
    maps[1, 0, 2:12, 2:12] = 1
    sampler = SeedSampler(erosion=5)
    foreground, _ = sampler.regions(maps, torch.rand(2, 400))
    assert foreground.sum(1).tolist() == [9, 36]
    maps[1, 0, :12, :12] = 1  # the border is not eroded
    assert sampler.regions(maps, torch.rand(2, 400))[0].sum(1).tolist() == [9, 100]


def test_the_erosion_is_in_proportion_to_the_side():
    assert [erosion_size(n) for n in (224, 64, 448, 32, 1)] == [11, 3, 21, 1, 1]
    maps = torch.zeros(1, 1, 64, 90)
    maps[..., 10:30, 10:30] = 1
    assert SeedSampler().regions(maps, torch.rand(1, 64 * 90))[0].sum() == 18**2


# --- seeds ---------------------------------------------------------------------------------------


def test_seeds_lie_in_their_dilated_regions():
    maps = coarse(4)
    sampler = SeedSampler(n_foreground=6, n_background=4, n_minus=0.4, erosion=3)
    seeds = sampler(maps, seeded())
    assert seeds.dtype == torch.int64
    assert seeds.shape == (4, 40, 56)
    assert set(seeds.unique().tolist()) == {-255, 0, 1}
    ties = torch.rand((3, 4, 40 * 56), generator=seeded())[0]
    regions = sampler.regions(maps, ties)
    for label, region in zip((1, 0), regions, strict=True):
        for i in range(4):
            grown = ndimage.binary_dilation(region[i].reshape(40, 56).numpy(), np.ones((3, 3)))
            assert not (seeds[i] == label).numpy()[~grown].any()


def test_without_dilation_the_counts_are_those_requested():
    seeds = SeedSampler(7, 5, kernel_size=1)(coarse(), seeded())
    assert (seeds == 1).sum((1, 2)).tolist() == [7] * 3
    assert (seeds == 0).sum((1, 2)).tolist() == [5] * 3
    few = torch.zeros(1, 1, 8, 8)
    few[..., 3, 3:5] = 1
    seeds = SeedSampler(7, 5, n_minus=2 / 64, kernel_size=1)(few, seeded())
    assert ((seeds == 1) == (few[:, 0] == 1)).all()  # two pixels there are
    assert (seeds == 0).sum() == 2


def test_pixels_of_both_classes_are_ignored():
    maps = torch.linspace(0, 1, 9).reshape(1, 1, 3, 3)
    seeds = SeedSampler(1, 1, n_minus=1 / 9, kernel_size=3, erosion=1)(maps, seeded())
    # All of the background, pixel (0, 0), reaches (1, 1); any foreground pixel does too.
    assert seeds[0, 1, 1] == -255
    assert (seeds == 1).any()
    assert seeds[0, 0, 0] == 0


def test_ties_are_random_and_all_pixels_equally_likely():
    maps = torch.zeros(1, 1, 12, 12)
    maps[..., 4:8, 4:8] = 1
    sampler, counts, n = SeedSampler(1, 1, kernel_size=1, erosion=1, n_minus=0.1), 0, 3000
    generator = seeded()
    counts = sum(sampler(maps, generator) == torch.tensor([[[[1]]], [[[0]]]]) for _ in range(n))
    inside = maps[0, 0] == 1
    foreground, background = counts[0, 0], counts[1, 0]
    assert foreground[~inside].sum() == 0
    assert background[inside].sum() == 0
    for result in (foreground[inside], background[~inside]):
        expected = n / len(result)
        chi2 = ((result - expected) ** 2 / expected).sum()
        assert chi2 < len(result) + 5 * (2 * len(result)) ** 0.5


def test_seeds_are_reproducible_and_a_batch_equals_its_images():
    maps = coarse(4)
    sampler = SeedSampler()
    assert torch.equal(sampler(maps, seeded()), sampler(maps, seeded()))
    assert not torch.equal(sampler(maps, seeded()), sampler(maps, seeded(1)))
    ties = torch.rand(4, 40 * 56, generator=seeded())
    together = sampler.regions(maps, ties)
    for i in range(4):
        alone = sampler.regions(maps[i : i + 1], ties[i : i + 1])
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    "value", [0.0, 1.0, 0.4, float("nan"), float("inf")], ids=["0", "1", "0.4", "nan", "inf"]
)
def test_flat_and_non_finite_maps_have_no_seeds(value):
    maps = coarse(2)
    maps[0] = value
    seeds = SeedSampler()(maps, seeded())
    assert (seeds[0] == -255).all()
    assert (seeds[1] == 1).any()
    maps = coarse(1)
    maps[0, 0, 3, 3] = float("nan")
    assert (SeedSampler()(maps, seeded()) == -255).all()


def test_two_adjacent_levels_give_background_seeds_only():
    """Otsu's threshold of 0 is raised to 1, so that no pixel is above it."""
    maps = torch.zeros(1, 1, 8, 8)
    maps[..., 2:5, 2:5] = 1.5 / 255
    seeds = SeedSampler(kernel_size=1)(maps, seeded())
    assert not (seeds == 1).any()
    assert (seeds == 0).sum() == 10


def test_a_single_pixel_gives_no_seeds():
    assert (SeedSampler()(torch.zeros(1, 1, 1, 1)) == -255).all()


def test_maps_with_a_graph_or_in_half_precision_give_seeds():
    maps = coarse()
    with_graph = maps.clone().requires_grad_()
    assert torch.equal(SeedSampler()(with_graph, seeded()), SeedSampler()(maps, seeded()))
    assert SeedSampler()(maps.bfloat16(), seeded()).shape == (3, 40, 56)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n_foreground": 0}, "n_foreground"),
        ({"n_background": 1.5}, "n_background"),
        ({"n_minus": 1.2}, "n_minus"),
        ({"n_minus": float("nan")}, "n_minus"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"erosion": 0}, "erosion"),
        ({"erosion": 2}, "erosion"),
    ],
)
def test_invalid_options_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        SeedSampler(**options)


@pytest.mark.parametrize(
    "maps",
    [
        torch.zeros(1, 4, 4),
        torch.zeros(1, 3, 4, 4),
        torch.zeros(0, 1, 4, 4),
        torch.ones(1, 1, 4, 4).int(),
    ],
)
def test_invalid_maps_are_refused(maps):
    with pytest.raises(ValueError, match="maps"):
        SeedSampler()(maps)


def test_the_repr_has_the_options_that_differ_from_their_defaults():
    assert repr(SeedSampler(1, n_minus=0.1)) == "SeedSampler(1, n_minus=0.1)"
