import pickle

import numpy as np
import pytest
import torch

from captum_ext.datasets import PATTERNS, BeetleExample, FineGrainedParts
from captum_ext.datasets.fine_grained import MEAN, STD, normalized, stacked


def pixels(specimen: BeetleExample) -> torch.Tensor:
    return stacked([specimen.image])[0]


@pytest.fixture(scope="module")
def specimens() -> list[BeetleExample]:
    return list(FineGrainedParts(48, seed=3))


# --- which picture -------------------------------------------------------------------------------


def test_a_specimen_depends_on_the_seed_and_its_number_alone() -> None:
    np.random.seed(1)
    first = pixels(FineGrainedParts(60, seed=5)[7])
    np.random.seed(2)
    state = np.random.get_state()[1].tolist()
    beetles = FineGrainedParts(8, seed=5)
    assert not pixels(beetles[3]).equal(first)
    assert pixels(beetles[7]).equal(first)
    assert pixels(beetles[-1]).equal(first)
    assert pixels(pickle.loads(pickle.dumps(beetles))[7]).equal(first)
    assert not pixels(FineGrainedParts(60, seed=6)[7]).equal(first)
    assert np.random.get_state()[1].tolist() == state


def test_each_eight_in_a_row_are_of_the_eight_classes() -> None:
    beetles = FineGrainedParts(800, seed=2)
    targets = torch.tensor([beetles.target(i) for i in range(800)]).reshape(100, 8)
    assert targets.sort(1)[0].equal(torch.arange(8).expand(100, 8))
    assert len(targets.unique(dim=0)) > 90
    assert beetles[9].target == beetles.target(9)


@pytest.mark.parametrize("size", [(224, 224), (64, 150)])
def test_classes_differ_inside_the_part_and_nowhere_else(size: tuple[int, int]) -> None:
    beetles = FineGrainedParts(12, seed=1, size=size)
    for i in range(len(beetles)):
        own, bare = beetles[i], beetles.variant(i, None)
        variants = [beetles.variant(i, target) for target in range(len(PATTERNS))]
        assert pixels(variants[own.target]).equal(pixels(own))
        assert [v.target for v in variants] == list(range(len(PATTERNS)))
        assert bare.target == own.target
        for j, one in enumerate(variants):
            assert one.part.equal(own.part)
            for other in (*variants[:j], bare):
                change = (pixels(one).int() - pixels(other)).abs().amax(0)
                assert not change[~own.part].any()
                assert (change[own.part] > 40).float().mean() > 0.15


# --- what is in it -------------------------------------------------------------------------------


def test_parts_are_tight_small_and_on_the_back(specimens: list[BeetleExample]) -> None:
    sides = []
    for specimen in specimens:
        assert specimen.image.mode == "RGB"
        assert specimen.image.size == (224, 224)
        x1, y1, x2, y2 = specimen.box.tolist()
        inside = specimen.part[y1:y2, x1:x2]
        assert inside.sum() == specimen.part.sum()
        assert inside.any(0)[[0, -1]].all()
        assert inside.any(1)[[0, -1]].all()
        assert not (specimen.part & ~specimen.body).any()
        sides += [x2 - x1, y2 - y1]
    assert min(sides) >= 30
    assert max(sides) <= 48  # two soft edges of up to one pixel more than the mark's 46
    assert max(sides) - min(sides) > 10
    centers = torch.stack([specimen.box.float() for specimen in specimens])
    assert (centers[:, :2] + centers[:, 2:]).div(2).std(0).min() > 15
    shares = torch.tensor([specimen.part.float().mean() for specimen in specimens])
    assert shares.min() > 0.012
    assert shares.max() < 0.036


def test_everything_scales_with_the_shorter_side() -> None:
    for specimen in FineGrainedParts(16, size=(112, 300)):
        assert specimen.image.size == (300, 112)
        assert specimen.part.shape == specimen.body.shape == (112, 300)
        x1, y1, x2, y2 = specimen.box.tolist()
        assert 15 <= min(x2 - x1, y2 - y1) <= max(x2 - x1, y2 - y1) <= 25


def test_colors_do_not_tell_the_class() -> None:
    """Over many specimens, each class has the same mean colour in its mark, and the same spread."""
    beetles = FineGrainedParts(100, seed=4, size=(64, 64))
    means = torch.stack(
        [
            torch.stack(
                [
                    pixels(v)[:, v.part].float().mean(1)
                    for v in map(beetles.variant, [i] * 8, range(8))
                ]
            )
            for i in range(100)
        ]
    )
    differences = means - means.mean(1, keepdim=True)
    assert (differences.mean(0).abs() < 3 * differences.std(0) / 10 + 2).all()
    spreads = means.std((0, 2))
    assert spreads.min() > 15
    assert spreads.max() < 1.5 * spreads.min()


def test_a_batch_is_its_specimens_normalised() -> None:
    beetles = FineGrainedParts(6, seed=1, size=(64, 80))
    images, targets, parts = beetles.batch([4, 1])
    assert images.shape == (2, 3, 64, 80)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    red = np.asarray(beetles[4].image)[20, 30, 0] / 255
    assert images[0, 0, 20, 30].item() == pytest.approx((red - MEAN) / STD, abs=1e-6)
    assert targets.tolist() == [beetles.target(4), beetles.target(1)]
    assert parts[1].equal(beetles[1].part)
    assert len(beetles.batch().images) == 6
    assert normalized(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-2, 2]


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"n": 0}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"size": (63, 224)}, "size"),
        ({"size": (224,)}, "size"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        FineGrainedParts(**options)


@pytest.mark.parametrize("target", [-1, 8])
def test_a_variant_is_of_one_of_the_classes(target: int) -> None:
    with pytest.raises(ValueError, match="`target` must be"):
        FineGrainedParts().variant(0, target)


@pytest.mark.parametrize("index", [4, -5])
def test_there_are_n_specimens(index: int) -> None:
    beetles = FineGrainedParts(4, size=(64, 64))
    assert len(beetles) == len(list(beetles)) == 4
    with pytest.raises(IndexError, match="of 4"):
        beetles[index]
