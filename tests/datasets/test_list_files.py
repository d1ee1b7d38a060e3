"""List files of layouts that name other files, or are long, large or deep."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from captum_ext._errors import ArgumentError
from captum_ext.datasets import Coco, Cub, Voc, coco
from tests.datasets.one_picture import (
    LAYOUTS,
    LISTS,
    layout_with,
    make_coco,
    make_cub,
    make_voc,
    make_wsol,
    write_lines,
)

# --- list files that name other files ------------------------------------------------------------

OUTSIDE = ["../p.jpg", "a/../../p.jpg", "{root}/p.jpg", "..", "a\\..\\..\\p.jpg", "/etc/passwd"]


@pytest.mark.parametrize("layout", LISTS)
@pytest.mark.parametrize("name", OUTSIDE)
def test_list_files_cannot_name_files_outside_of_the_folder(layout, name, tmp_path):
    make, folder = LAYOUTS[layout]
    root = tmp_path / "data"
    (root / folder / "a").mkdir(parents=True)
    for path in (tmp_path, root, root / folder):
        Image.new("RGB", (4, 4)).save(path / "p.jpg")
    with pytest.raises(ArgumentError, match=r"names .* outside") as caught:
        make(root, name.format(root=tmp_path))
    assert caught.value.argument == "root"
    assert make(root, "p.jpg")[0].size == (4, 4)


@pytest.mark.parametrize("masks", [("../m.png", ""), ("m.png", "/etc/m.png"), ("a/../../m", "")])
def test_list_files_cannot_name_masks_outside_of_the_folder(masks, tmp_path):
    with pytest.raises(ArgumentError, match=r"localization\.txt names .* outside"):
        make_wsol(tmp_path, "p.jpg", localization=True, masks=masks)


def test_dots_in_names_are_allowed(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images/a..b.jpg")
    assert make_wsol(tmp_path, "a..b.jpg")[0].name == "a..b.jpg"


# --- list files of any size and depth ------------------------------------------------------------


def refusal(make, *args):
    """The text of a ValueError, which must be short."""
    with pytest.raises(ValueError, match=r".") as caught:
        make(*args)
    text = str(caught.value)
    assert len(text) < 1200, len(text)
    return text


@pytest.mark.parametrize("layout", LISTS)
def test_names_longer_than_any_path_are_refused_in_few_words(layout, tmp_path):
    make, folder = LAYOUTS[layout]
    (tmp_path / folder).mkdir()
    if layout == "voc":
        write_lines(tmp_path / "ImageSets/Main/test.txt", "x" * 10**6)
        assert "test.txt names 'xxx" in refusal(Voc, tmp_path)
    else:
        assert "names 'xxx" in refusal(make, tmp_path, "x" * 10**6)


LONG = "x" * 10**6


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("images.txt", f"1 {LONG} {LONG}"),
        ("image_class_labels.txt", f"1 {LONG}"),
        ("image_class_labels.txt", f"{LONG} 1"),
        ("image_class_labels.txt", f"1 {'9' * 4000}"),
        ("image_class_labels.txt", f"1 {'9' * 10**6}"),
        ("bounding_boxes.txt", f"1 1 1 1 {LONG}"),
        ("bounding_boxes.txt", LONG),
    ],
)
def test_errors_about_long_lines_are_short(file, line, tmp_path):
    make_cub(tmp_path, "p.jpg")
    write_lines(tmp_path / file, line)
    assert file in refusal(Cub, tmp_path)


def test_boxes_beyond_64_bits_are_clipped_or_refused(tmp_path):
    data = layout_with("cub", tmp_path, lambda path: Image.new("RGB", (4, 3)).save(path, "PNG"))
    write_lines(tmp_path / "bounding_boxes.txt", "1 1 -1e300 1e300 1e301")
    assert Cub(tmp_path)[0].boxes.tolist() == [[1, 0, 4, 3]]
    write_lines(tmp_path / "bounding_boxes.txt", "1 1e300 0 1e300 5")
    data = Cub(tmp_path)
    assert "is empty or outside the image of 4 x 3" in refusal(data.__getitem__, 0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_annotations_with_entities_are_refused(encoding, tmp_path):
    """Nine levels of ten entities each would be 3 GB of text."""
    make_voc(tmp_path, "p.jpg")
    entities = ['<!ENTITY a0 "lol">']
    entities += [f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10)]
    text = (
        f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [{"".join(entities)}]><a>&a9;</a>'
    )
    (tmp_path / "Annotations/p.xml").write_bytes(text.encode(encoding))
    assert "p.xml: a document type is not allowed" in refusal(Voc, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"images": ' + "[" * 500 + "]" * 500 + ', "categories": [], "annotations": []}',
        '{"images": [], "categories": ' + '"x"' * 10**6 + ', "annotations": []}',
        '{"images": "' + LONG + '", "categories": [], "annotations": []}',
        '{"images": [], "categories": [], "annotations": [' + "9" * 10**5 + "]}",
    ],
)
def test_coco_files_of_any_depth_are_refused_in_few_words(text, tmp_path):
    make_coco(tmp_path, "p.jpg")
    write_lines(tmp_path / "annotations/instances_val2017.json", text)
    assert "instances_val2017.json" in refusal(Coco, tmp_path)


def coco_with(folder, **changes):
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (6, 5)).save(folder / "images/p.jpg")
    make_coco(folder, "p.jpg")
    file = folder / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0] |= changes
    file.write_text(json.dumps(content))
    return Coco(folder)


@pytest.mark.parametrize(
    "counts",
    [
        [2**62, 2**62, 2**62, 2**62 + 30],  # their sum is 30 in 64 bits
        [10**30],
        [-1, 31],
        "o" * 10**6,  # a number of five million bits
        "_" * 12 + "0",
        LONG,
        [[30]],
        [30.0, "a"],
    ],
)
def test_run_lengths_beyond_the_picture_are_refused(counts, tmp_path):
    data = coco_with(tmp_path, segmentation={"size": [5, 6], "counts": counts})
    assert "the segmentation of p-cat" in refusal(data.__getitem__, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"segmentation": {"size": [5] * 10**6, "counts": [30]}},
        {"segmentation": [[0, 0, 10**400, 0, 0, 5]]},
        {"segmentation": LONG},
        {"bbox": [0, 0, 10**400, 1]},
        {"bbox": [LONG, 0, 1, 1]},
        {"category_id": LONG},
        {"image_id": LONG},
        {"image_id": [[[]]] * 1000},
    ],
)
def test_annotations_of_any_size_are_refused_in_few_words(changes, tmp_path):
    refusal(lambda: coco_with(tmp_path, **changes)[0])


def test_polygons_may_reach_far_beyond_the_picture(tmp_path):
    far = [-1e308, -1e308, 1e308, -1e308, 1e308, 1e308, -1e308, 1e308]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert coco_with(tmp_path, segmentation=[far])[0].mask.all()


def test_polygons_of_many_corners_are_filled_in_parts(monkeypatch):
    corners = np.random.default_rng(0).uniform(-3, 25, (200, 2)).round(1)
    polygon = corners.flatten().tolist()
    at_once = coco._fill_polygon(polygon, 19, 23)
    monkeypatch.setattr(coco, "_CHUNK", 100)  # 5 edges
    assert at_once.any()
    assert (coco._fill_polygon(polygon, 19, 23) == at_once).all()
