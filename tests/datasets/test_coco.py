"""COCO's layout, on a small made-up set; the texts of run lengths come from pycocotools 2.0."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from captum_ext.cli import layouts
from captum_ext.datasets import Coco
from captum_ext.datasets import coco as module
from captum_ext.evaluation import evaluate, summary
from tests.evaluation.subjects import FixedMap
from tests.networks import tiny_net
from tests.test_cli_evaluate_layouts import evaluated, weights

evaluated, weights = evaluated, weights  # fixtures

SQUARE = [1, 1, 4, 1, 4, 3, 1, 3]  # pixels 1 to 3, rows 1 and 2


def annotation(image, category, box, segmentation=None, **others):
    entry = {"image_id": image, "category_id": category, "bbox": box, **others}
    return entry if segmentation is None else {**entry, "segmentation": segmentation}


def content():
    return {
        "images": [
            {"id": 12, "file_name": "b.png", "width": 6, "height": 5},
            {"id": 7, "file_name": "a.jpg", "width": 6, "height": 5},
            {"id": 8, "file_name": "empty.png", "width": 6, "height": 5},
        ],
        "categories": [
            {"id": 90, "name": "toothbrush"},
            {"id": 1, "name": "person"},
            {"id": 18, "name": "dog"},
        ],
        "annotations": [
            annotation(7, 18, [1, 1, 3, 2], [SQUARE], iscrowd=0),
            annotation(7, 18, [3.5, 0.25, 2.0, 1.5], {"size": [5, 6], "counts": [20, 2, 8]}),
            # 2 pixels outside and 6 inside, in columns 0 and 1
            annotation(7, 18, [0, 0, 2, 5], {"size": [5, 6], "counts": [2, 6, 22]}, iscrowd=1),
            annotation(7, 1, [0, 0, 6, 5], [SQUARE, [5, 3, 6, 3, 6, 5, 5, 5]]),
            annotation(12, 1, [0, 0, 6, 5], {"size": [5, 6], "counts": "52"}, iscrowd=1),
            annotation(12, 90, [2, 1, 2, 3]),
            annotation(12, 90, [2, 1, 0, 3]),
        ],
    }


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / "coco"
    (root / "val2017").mkdir(parents=True)
    for name in ("a.jpg", "b.png", "empty.png"):
        Image.new("L", (6, 5), 99).save(root / "val2017" / name)
    write(root, content())
    return root


def write(root, values, split="val2017"):
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(values))


def test_an_example_for_each_picture_and_class(coco):
    data = Coco(coco)
    assert data.classes == ("person", "dog", "toothbrush")  # in the order of the ids
    assert data.names == ["a-person", "a-dog", "b-toothbrush"]
    assert [data.target(i) for i in range(len(data))] == [0, 1, 2]
    assert [example.image.mode for example in data] == ["RGB"] * 3
    assert [example.boxes.tolist() for example in data] == [
        [[0, 0, 6, 5]],
        [[1, 1, 4, 3], [3, 0, 6, 2]],  # from x, y, width, height; fractions go outwards
        [[2, 1, 4, 4]],
    ]


def test_masks_are_the_union_and_crowds_are_ignored(coco):
    person, dog, brush = Coco(coco)
    assert person.mask.int().tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 1],
    ]
    assert person.ignored is None
    assert dog.mask.int().tolist() == [
        [0, 0, 0, 0, 1, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert dog.ignored.int().tolist() == [  # without the pixels of the mask
        [0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
    ]
    assert brush.mask is brush.ignored is None  # it has no segmentation


def test_polygons_cover_the_pixels_whose_centres_are_inside():
    triangle = [0.0, 0.0, 4.0, 0.0, 0.0, 4.0]
    rows = module._fill_polygon(triangle, 4, 5).astype(int).tolist()
    assert rows == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    bow = [0, 0, 6, 4, 6, 0, 0, 4]  # two triangles, left and right
    rows = module._fill_polygon(bow, 4, 6).astype(int).tolist()
    assert rows == [[1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1]]
    beyond = [-3.0, -3.0, 9.0, -3.0, 9.0, 1.5, -3.0, 1.5]
    assert module._fill_polygon(beyond, 3, 4).astype(int).tolist() == [[1] * 4, [0] * 4, [0] * 4]
    assert not module._fill_polygon([1, 1, 3, 3], 4, 4).any()


@pytest.mark.parametrize(
    ("text", "size", "inside"),
    [
        ("5220002O", (4, 5), [(slice(1, 3), slice(1, 4)), (3, 4)]),
        ("k8R16" + "0" * 71 + "]7", (40, 50), [(slice(3, 37), slice(7, 44))]),
    ],
)
def test_texts_of_run_lengths_are_decoded(text, size, inside):
    expected = np.zeros(size, dtype=bool)
    for part in inside:
        expected[part] = True
    assert (module._decode_mask({"size": size, "counts": text}, *size) == expected).all()
    runs = module._decode_text(text)
    assert sum(runs) == expected.size
    assert min(runs) > 0
    assert (module._decode_mask({"size": size, "counts": runs}, *size) == expected).all()


def test_pictures_may_be_in_the_folder_images_and_classes_in_another_order(coco):
    (coco / "val2017").rename(coco / "images")
    data = Coco(coco, classes=["dog", "mouse", "toothbrush", "person"])
    assert [(example.name, example.target) for example in data] == [
        ("a-dog", 0),
        ("a-person", 3),
        ("b-toothbrush", 2),
    ]
    assert data.samples[0] == (str(coco / "images" / "a.jpg"), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": []}, "no object"),
        ({"annotations": [annotation(7, 2, [0, 0, 1, 1])]}, "picture 7, category 2"),
        ({"annotations": [annotation(9, 1, [0, 0, 1, 1])]}, "picture 9, category 1"),
        (
            {"annotations": [annotation(7, 1, [0, 0, 1])]},
            "a box must be four finite numbers, .x, y, width, height., got .0, 0, 1.",
        ),
        (
            {"annotations": [annotation(7, 1, [0, 0, "a", 1])]},
            r"four finite numbers.*got .0, 0, 'a', 1.",
        ),
        (
            {"annotations": [annotation(7, 1, [0, float("nan"), 1, 1])]},
            r"four finite numbers.*got .0, nan, 1, 1.",
        ),
        ({"annotations": [{"bbox": [0, 0, 1, 1]}]}, "there is no 'category_id'"),
        ({"annotations": [annotation(7, 1, 5)]}, "four finite numbers.*got 5"),
        ({"images": 3}, "'images' must be a list of objects, got 3"),
        (
            {"images": [[1, "a.jpg"]]},
            "'images' must be a list of objects, got the entry .1, 'a.jpg'.",
        ),
        ({"annotations": ["dog"]}, "'annotations' must be a list of objects, got the entry 'dog'"),
        ({"annotations": {"a": 1}}, "'annotations' must be a list of objects"),
        ({"categories": [{"id": [1], "name": "dog"}]}, "'id' in 'categories' must be a number"),
        (
            {"categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}]},
            "has 'dog' more than once",
        ),
    ],
)
def test_invalid_files_are_named(change, message, coco):
    write(coco, content() | change)
    with pytest.raises(ValueError, match=rf"instances_val2017\.json: .*{message}"):
        Coco(coco)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("cat", "`classes` must be a list of names, got 'cat'"),
        ([], "`classes` must be a list of names"),
        (3, "`classes` must be a list of names, got 3"),
        (["dog", 3], "`classes` must be a list of names, got"),
        (["dog", "person", "dog"], "`classes` must be distinct names, got 'dog' more than once"),
    ],
)
def test_classes_must_be_distinct_names(classes, message, coco):
    with pytest.raises(ValueError, match=f"^{message}"):
        Coco(coco, classes=classes)


def test_a_file_that_is_not_an_object_is_named(coco):
    (coco / "annotations" / "instances_val2017.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"instances_val2017\.json: expected an object, got"):
        Coco(coco)


def test_missing_files_and_classes_are_named(coco):
    with pytest.raises(FileNotFoundError, match=r"instances_train\.json is missing"):
        Coco(coco, "train")
    with pytest.raises(ValueError, match="the class 'dog' is not in `classes`"):
        Coco(coco, classes=["person", "toothbrush"])
    (coco / "annotations" / "instances_val2017.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_val2017\.json: "):
        Coco(coco)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [5, 6], "counts": [3, 4]}, "runs of 7 pixels in a mask of size .5, 6."),
        ({"size": [6, 5], "counts": [30]}, "size .6, 5. do not fit a picture of .5, 6."),
        ({"size": [5, 6]}, "'counts'"),
        ([[1, 2, 3]], "cannot be understood"),
        ([SQUARE, []], r"a polygon must be .* at least three corners, got \[\]"),
        ([[1, 1, 3, 3]], r"at least three corners, got \[1, 1, 3, 3\]"),
        ([[1, 1, 3, 3, 1, float("inf")]], "finite numbers.*inf"),
        ([[1, 1, 3, 3, 1, "2"]], "finite numbers"),
        ([[1, 1, 3, 3, 1, 2, 3]], "a polygon must be"),
        (["dog"], "a polygon must be .* got 'dog'"),
        ("dog", "expected polygons or run lengths, got 'dog'"),
    ],
)
def test_invalid_segmentations_are_named(segmentation, message, coco):
    write(coco, content() | {"annotations": [annotation(7, 1, [0, 0, 6, 5], segmentation)]})
    with pytest.raises(
        ValueError, match=rf"val2017\.json: the segmentation of a-person.*{message}"
    ):
        Coco(coco)[0]


def test_evaluate_accepts_coco(coco, tmp_path):
    result = evaluate(
        {"a": FixedMap(tiny_net())},
        Coco(coco),
        output=tmp_path / "run",
        batch_size=2,
        show_progress=False,
    )
    assert result.failures == {"a": 0}
    assert result.figures["a"]["energy"].images == 3
    assert result.figures["a"]["pxap"].images == 2  # the others have no mask


def test_the_shell_accepts_coco(coco, evaluated):
    assert layouts.find_layout(str(coco)) == "coco"
    assert evaluated(3, coco, "--metrics", "energy")[0] == 0
    assert summary("run").images == {"grad-cam": 3}
    code, message = evaluated(3, coco, "--split", "train", "--output", "other")
    assert code == 2
    assert "instances_train.json is missing: the layout is coco and the split 'train'" in message
    assert torch.equal(Coco(coco)[1].boxes, torch.tensor([[1, 1, 4, 3], [3, 0, 6, 2]]))
