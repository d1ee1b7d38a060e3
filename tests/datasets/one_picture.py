"""Public layouts of one picture."""

import json
from pathlib import Path

from captum_ext.datasets import ClassFolders, Coco, Cub, Voc, WsolFolder


def write_lines(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def make_classes(root, name):
    return ClassFolders(root)


def make_cub(root, name, **options):
    write_lines(root / "images.txt", f"1 {name}")
    write_lines(root / "image_class_labels.txt", "1 1")
    write_lines(root / "train_test_split.txt", "1 0")
    write_lines(root / "bounding_boxes.txt", "1 0 0 1 1")
    return Cub(root, **options)


def make_voc(root, name):
    """Voc adds the ending .jpg, whatever the format is."""
    key = name.removesuffix(".jpg")
    box = "<xmin>1</xmin><ymin>1</ymin><xmax>1</xmax><ymax>1</ymax>"
    write_lines(root / "ImageSets/Main/test.txt", key)
    annotation = f"<a><object><name>cat</name><bndbox>{box}</bndbox></object></a>"
    write_lines(root / f"Annotations/{Path(key).name}.xml", annotation)
    return Voc(root)


def make_wsol(root, name, localization=False, masks=("m.png", "")):
    write_lines(root / "test/image_ids.txt", name)
    write_lines(root / "test/class_labels.txt", f"{name},0")
    write_lines(root / "test/localization.txt", f"{name},{','.join(masks)}")
    return WsolFolder(root, root / "images", masks=root / "masks", localization=localization)


def make_coco(root, name):
    content = {
        "images": [{"id": 1, "file_name": name}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}],
    }
    write_lines(root / "annotations/instances_val2017.json", json.dumps(content))
    return Coco(root)


LAYOUTS = {
    "classes": (make_classes, "a"),
    "cub": (make_cub, "images"),
    "voc": (make_voc, "JPEGImages"),
    "wsol": (make_wsol, "images"),
    "coco": (make_coco, "images"),
}
LISTS = [name for name in LAYOUTS if name != "classes"]


def layout_with(layout, root, write):
    """A data set of one picture, which a function writes to a path."""
    make, folder = LAYOUTS[layout]
    (root / folder).mkdir(parents=True)
    write(root / folder / "p.jpg")
    return make(root, "p.jpg")
