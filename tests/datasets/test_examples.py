"""Checks of `Example`, and the examples of the seeded sets."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from captum_ext import datasets
from captum_ext._data.pictures import PictureDataset
from captum_ext._errors import ArgumentError
from captum_ext.datasets import (
    Example,
    FineGrainedParts,
    PastedScenes,
    TexturedEllipses,
    is_difficult,
)
from captum_ext.fcam.views import BoxedPictures

SETS = {
    "pasted": PastedScenes(6, seed=3, size=(160, 200)),
    "parts": FineGrainedParts(6, seed=3, size=(64, 80)),
    "ellipses": TexturedEllipses(6, seed=3, size=(32, 40)),
}


def example(**parts):
    arguments = {"image": Image.new("RGB", (6, 4)), "target": 1, "name": "a/1.jpg"}
    return Example(**arguments | parts)


def test_images_may_be_pictures_or_bytes():
    boxes = torch.tensor([[0, 0, 6, 4], [5, 3, 6, 4]])
    mask = torch.ones(4, 6, dtype=torch.bool)
    for image in (Image.new("RGB", (6, 4)), torch.zeros(3, 4, 6, dtype=torch.uint8)):
        assert example(image=image, boxes=boxes, mask=mask, ignored=~mask).size == (4, 6)
    assert example(boxes=torch.zeros(0, 4, dtype=torch.int64)).boxes.shape == (0, 4)
    bare = example()
    assert bare.boxes is bare.mask is bare.ignored is None


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"boxes": torch.tensor([[0, 0, 7, 4]])}, ValueError, r"boxes.*a/1.jpg.*x2 <= 6.*7"),
        ({"boxes": torch.tensor([[0, 0, 6, 5]])}, ValueError, r"y2 <= 4"),
        ({"boxes": torch.tensor([[-1, 0, 6, 4]])}, ValueError, r"boxes"),
        ({"boxes": torch.tensor([[2, 0, 2, 4]])}, ValueError, r"x1 < x2"),
        ({"boxes": torch.tensor([0, 0, 6, 4])}, ValueError, r"\(n, 4\), got \(4,\)"),
        ({"boxes": torch.tensor([[0.0, 0, 6, 4]])}, TypeError, r"int64.*float32"),
        ({"boxes": [[0, 0, 6, 4]]}, TypeError, r"int64.*list"),
        ({"mask": torch.ones(6, 4, dtype=torch.bool)}, ValueError, r"mask.*\(4, 6\), got \(6, 4\)"),
        ({"ignored": torch.ones(4, 6)}, TypeError, r"ignored.*bool"),
        ({"image": torch.zeros(3, 4, 6)}, TypeError, r"image.*a/1.jpg.*uint8"),
        ({"image": torch.zeros(4, 6, dtype=torch.uint8)}, TypeError, r"\(3, H, W\)"),
        ({"image": "a/1.jpg"}, TypeError, r"image.*str"),
    ],
)
def test_parts_that_do_not_fit_are_named(parts, error, message):
    with pytest.raises(error, match=message):
        example(**parts)


@pytest.mark.parametrize("data", SETS.values(), ids=SETS)
def test_seeded_sets_have_consistent_examples(data):
    """Masks agree with boxes, and names and targets are known before the picture is drawn."""
    for i, drawn in enumerate(data):
        assert isinstance(drawn, Example)
        assert drawn.size == data.size
        assert (drawn.name, drawn.target) == (data.name(i), data.target(i))
        inside = torch.zeros(drawn.size, dtype=torch.bool)
        for x1, y1, x2, y2 in drawn.boxes.tolist():
            inside[y1:y2, x1:x2] = True
            assert drawn.mask[y1:y2, x1:x2].any(0).all()
            assert drawn.mask[y1:y2, x1:x2].any(1).all()
        assert not (drawn.mask & ~inside).any()
        assert replace(drawn, name="other").name == "other"
    assert len({data.name(i) for i in range(6)}) == 6
    assert data.name(-1) == data.name(5)
    assert "-3-" in data.name(0)
    with pytest.raises(IndexError):
        data.name(6)


def test_variants_have_distinct_names():
    data = FineGrainedParts(8, seed=2)
    names = {data.variant(5, target).name for target in (None, *range(8))}
    assert len(names) == 9
    assert data[5].name in names


@pytest.mark.parametrize("data", SETS.values(), ids=SETS)
def test_training_accepts_the_seeded_sets(data):
    item = PictureDataset(data, (20, 24))[1]
    assert (item.label, item.is_read, item.pixels.shape) == (data[1].target, True, (3, 20, 24))
    pixels, boxes = BoxedPictures(data, data.size)[1]
    assert pixels.shape == (3, *data.size)
    assert boxes.tolist() == data[1].boxes.tolist()


def test_training_needs_boxes_for_validation_only():
    bare = [example(image=Image.new("RGB", (6, 4), (9, 9, 9)))]
    assert PictureDataset(bare, (4, 6))[0].pixels.unique().tolist() == [9]
    with pytest.raises(ValueError, match=r"validation.*no boxes"):
        BoxedPictures(bare, (4, 6))[0]


def test_difficult_examples_are_small_and_not_alone():
    quarter, less = torch.tensor([[0, 0, 5, 5]]), torch.tensor([[5, 1, 10, 5], [0, 0, 2, 2]])
    assert not is_difficult(quarter, (10, 10), 1)
    assert is_difficult(less, (10, 10), 2)
    assert not is_difficult(less, (10, 10), 0)
    assert not is_difficult(less, (8, 12), 1)  # 24 of 96
    assert not is_difficult(less.repeat(2, 1), (10, 10), 1)  # areas add up


def test_sets_and_examples_show_their_options_and_shapes():
    assert repr(TexturedEllipses(6, cue="head")) == "TexturedEllipses(6, cue='head')"
    assert repr(FineGrainedParts(size=(64, 80))) == "FineGrainedParts(size=(64, 80))"
    mask = torch.ones(4, 6, dtype=torch.bool)
    assert repr(Example(torch.zeros(3, 4, 6, dtype=torch.uint8), 1, "a", mask=mask)) == (
        "Example(image=Tensor((3, 4, 6), uint8), target=1, name='a', boxes=None, "
        "mask=Tensor((4, 6), bool), ignored=None)"
    )


@pytest.mark.parametrize(("old", "new"), [("Specimen", "BeetleExample"), ("Batch", "BeetleBatch")])
def test_old_names_work_with_a_warning(old, new):
    with pytest.warns(DeprecationWarning, match=f"datasets.{old} is now .*datasets.{new}"):
        assert getattr(datasets, old) is getattr(datasets, new)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = datasets.Nothing


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: TexturedEllipses(0), "n"),
        (lambda: PastedScenes(seed=-1), "seed"),
        (lambda: PastedScenes(kind="large"), "kind"),
        (lambda: FineGrainedParts(size=(8, 8)), "size"),
        (lambda: FineGrainedParts().variant(0, 8), "target"),
    ],
)
def test_errors_carry_the_name_of_the_argument(make, argument):
    with pytest.raises(ArgumentError, match=f"`{argument}` must be") as raised:
        make()
    assert raised.value.argument == argument
