"""The one form of data: what an example is checked for, and that all sets give it."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from captum_ext._data.pictures import PictureDataset
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
    given = {"image": Image.new("RGB", (6, 4)), "target": 1, "name": "a/1.jpg"}
    return Example(**given | parts)


def test_an_example_of_a_picture_or_of_bytes():
    boxes = torch.tensor([[0, 0, 6, 4], [5, 3, 6, 4]])
    mask = torch.ones(4, 6, dtype=torch.bool)
    for image in (Image.new("RGB", (6, 4)), torch.zeros(3, 4, 6, dtype=torch.uint8)):
        assert example(image=image, boxes=boxes, mask=mask, ignored=~mask).size == (4, 6)
    assert example(boxes=torch.zeros(0, 4, dtype=torch.int64)).boxes.shape == (0, 4)
    bare = example()
    assert bare.boxes is bare.mask is bare.ignored is None


@pytest.mark.parametrize(
    ("parts", "error", "said"),
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
def test_what_does_not_fit_is_named(parts, error, said):
    with pytest.raises(error, match=said):
        example(**parts)


@pytest.mark.parametrize("data", SETS.values(), ids=SETS)
def test_the_seeded_sets_give_examples(data):
    """Mask and boxes agree; names are the example's own, and known before it is drawn."""
    for i, one in enumerate(data):
        assert isinstance(one, Example)
        assert one.size == data.size
        assert (one.name, one.target) == (data.name(i), data.target(i))
        inside = torch.zeros(one.size, dtype=torch.bool)
        for x1, y1, x2, y2 in one.boxes.tolist():
            inside[y1:y2, x1:x2] = True
            assert one.mask[y1:y2, x1:x2].any(0).all()
            assert one.mask[y1:y2, x1:x2].any(1).all()
        assert not (one.mask & ~inside).any()
        assert replace(one, name="other").name == "other"
    assert len({data.name(i) for i in range(6)}) == 6
    assert data.name(-1) == data.name(5)
    assert "-3-" in data.name(0)
    with pytest.raises(IndexError):
        data.name(6)


def test_a_variant_has_a_name_of_its_own():
    data = FineGrainedParts(8, seed=2)
    names = {data.variant(5, target).name for target in (None, *range(8))}
    assert len(names) == 9
    assert data[5].name in names


@pytest.mark.parametrize("data", SETS.values(), ids=SETS)
def test_training_takes_the_seeded_sets(data):
    item = PictureDataset(data, (20, 24))[1]
    assert (item.label, item.is_read, item.pixels.shape) == (data[1].target, True, (3, 20, 24))
    pixels, boxes = BoxedPictures(data, data.size)[1]
    assert pixels.shape == (3, *data.size)
    assert boxes.tolist() == data[1].boxes.tolist()


def test_training_wants_boxes_only_where_it_is_judged_by_them():
    bare = [example(image=Image.new("RGB", (6, 4), (9, 9, 9)))]
    assert PictureDataset(bare, (4, 6))[0].pixels.unique().tolist() == [9]
    with pytest.raises(ValueError, match=r"validation.*no boxes"):
        BoxedPictures(bare, (4, 6))[0]


def test_difficult_is_small_and_not_alone():
    quarter, less = torch.tensor([[0, 0, 5, 5]]), torch.tensor([[5, 1, 10, 5], [0, 0, 2, 2]])
    assert not is_difficult(quarter, (10, 10), 1)
    assert is_difficult(less, (10, 10), 2)
    assert not is_difficult(less, (10, 10), 0)
    assert not is_difficult(less, (8, 12), 1)  # 24 of 96
    assert not is_difficult(less.repeat(2, 1), (10, 10), 1)  # areas add up
