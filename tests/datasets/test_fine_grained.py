import pickle

import numpy as np
import pytest
import torch

from captum_ext.datasets import PATTERNS, BeetleExample, FineGrainedParts
from captum_ext.datasets.fine_grained import MEAN, STD, normalized, stacked


def pixels(example: BeetleExample) -> torch.Tensor:
    return stacked([example.image])[0]


@pytest.fixture(scope="module")
def examples() -> list[BeetleExample]:
    return list(FineGrainedParts(48, seed=3))


# --- seeds and classes ---------------------------------------------------------------------------


def test_an_example_depends_on_the_seed_and_its_index_alone() -> None:
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


def test_every_run_of_eight_has_each_class_once() -> None:
    beetles = FineGrainedParts(800, seed=2)
    targets = torch.tensor([beetles.target(i) for i in range(800)]).reshape(100, 8)
    assert targets.sort(1)[0].equal(torch.arange(8).expand(100, 8))
    assert len(targets.unique(dim=0)) > 90
    assert beetles[9].target == beetles.target(9)


@pytest.mark.parametrize("size", [(224, 224), (64, 150)])
def test_classes_differ_inside_the_part_and_nowhere_else(size: tuple[int, int]) -> None:
    beetles = FineGrainedParts(12, seed=1, size=size)
    for i in range(len(beetles)):
        beetle, bare = beetles[i], beetles.variant(i, None)
        variants = [beetles.variant(i, target) for target in range(len(PATTERNS))]
        assert pixels(variants[beetle.target]).equal(pixels(beetle))
        assert [v.target for v in variants] == list(range(len(PATTERNS)))
        assert bare.target == beetle.target
        for j, variant in enumerate(variants):
            assert variant.part.equal(beetle.part)
            for other in (*variants[:j], bare):
                change = (pixels(variant).int() - pixels(other)).abs().amax(0)
                assert not change[~beetle.part].any()
                assert (change[beetle.part] > 40).float().mean() > 0.15


# --- contents ------------------------------------------------------------------------------------


def test_parts_are_tight_small_and_on_the_back(examples: list[BeetleExample]) -> None:
    sides = []
    for example in examples:
        assert example.image.mode == "RGB"
        assert example.image.size == (224, 224)
        x1, y1, x2, y2 = example.box.tolist()
        inside = example.part[y1:y2, x1:x2]
        assert inside.sum() == example.part.sum()
        assert inside.any(0)[[0, -1]].all()
        assert inside.any(1)[[0, -1]].all()
        assert not (example.part & ~example.body).any()
        sides += [x2 - x1, y2 - y1]
    assert min(sides) >= 30
    assert max(sides) <= 48  # two soft edges of up to one pixel more than the mark's 46
    assert max(sides) - min(sides) > 10
    centers = torch.stack([example.box.float() for example in examples])
    assert (centers[:, :2] + centers[:, 2:]).div(2).std(0).min() > 15
    shares = torch.tensor([example.part.float().mean() for example in examples])
    assert shares.min() > 0.012
    assert shares.max() < 0.036


def test_everything_scales_with_the_shorter_side() -> None:
    for example in FineGrainedParts(16, size=(112, 300)):
        assert example.image.size == (300, 112)
        assert example.part.shape == example.body.shape == (112, 300)
        x1, y1, x2, y2 = example.box.tolist()
        assert 15 <= min(x2 - x1, y2 - y1) <= max(x2 - x1, y2 - y1) <= 25


def test_colors_do_not_depend_on_the_class() -> None:
    """Over many examples, all classes have the same mean colour and spread in their marks."""
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


def test_a_batch_has_normalised_images() -> None:
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
def test_a_variant_of_an_unknown_class_raises_an_error(target: int) -> None:
    with pytest.raises(ValueError, match="`target` must be"):
        FineGrainedParts().variant(0, target)


@pytest.mark.parametrize("index", [4, -5])
def test_a_set_has_n_examples(index: int) -> None:
    beetles = FineGrainedParts(4, size=(64, 64))
    assert len(beetles) == len(list(beetles)) == 4
    with pytest.raises(IndexError, match="of 4"):
        beetles[index]
