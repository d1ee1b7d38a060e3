"""COCO's layout, after unpacking, or any other set with its `instances_*.json`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_ext._checks import first_line, is_finite
from captum_ext._errors import ArgumentError
from captum_ext._repr import bounded_repr
from captum_ext.datasets._files import (
    AnyPath,
    Box,
    LayoutDataset,
    check_inside,
    check_unique,
    clip_boxes,
    first_of,
    round_outwards,
)
from captum_ext.datasets.examples import Example

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, Any]
# Errors of invalid values, of numbers beyond 64 bits, and of values nested thousands deep.
_INVALID = (ValueError, OverflowError, RecursionError)
_FAR = 1e9  # pixels; corners of polygons farther away are moved there
_LONGEST_RUN = 60  # bits
_CHUNK = 2**22  # pairs of edges and rows that are compared at once


class _Object(NamedTuple):
    """An annotated object; its segmentation is polygons, run lengths, or None."""

    box: Box
    segmentation: Any
    is_crowd: bool


class Coco(LayoutDataset):
    """COCO: an example for each picture and class in it, with the boxes and the mask of that class.

    The root holds ``annotations/instances_<split>.json``, and the pictures in the folder
    ``<split>`` or ``images``. Boxes in the file are x, y, width and height, from 0. They become
    half-open, and fractions are rounded outwards. The mask is the union of the objects'
    segmentations, if each object has one: polygons (a pixel is inside if its centre is, by the
    even-odd rule; several are united), or run lengths, as numbers or as COCO's text. Crowds do not
    count as objects: their pixels are ignored, and a class with only crowds in a picture gives no
    example. The few objects whose box has no area are left out.

    Run lengths are read as by pycocotools. pycocotools rounds the corners of polygons to a fifth of
    a pixel, which this class does not; about 0.4% of an object's pixels differ, along its border.

    Args:
        root: the folder.
        split: the name of the split, such as "val2017".
        classes: the names of the classes, in the order of the classifier's outputs. None takes the
            names in the file, in the order of their ids: COCO's 80.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        ValueError: an invalid file, a class that is not in `classes`, no object; `classes` that are
            not distinct names.

    Reference:
        Lin et al., "Microsoft COCO: Common Objects in Context", 2014.

    Example:
        >>> example = Coco("coco", "val2017")[0]  # doctest: +SKIP
        >>> example.name, example.boxes.shape, example.mask.shape  # doctest: +SKIP
        ('000000000139-chair', torch.Size([6, 4]), torch.Size([426, 640]))
    """

    def __init__(
        self, root: AnyPath, split: str = "val2017", *, classes: Sequence[str] | None = None
    ) -> None:
        if classes is not None:
            _check_classes(classes)
        path = Path(root) / "annotations" / f"instances_{split}.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing.")
        folder = Path(root) / split
        folder = folder if folder.is_dir() else Path(root) / "images"
        try:
            content = json.loads(path.read_bytes())
            if not isinstance(content, Mapping):
                raise ValueError(f"expected an object, got {bounded_repr(content)}")
            categories = {
                c["id"]: str(c["name"]) for c in _checked_entries(content, "categories", "id")
            }
            check_unique(path, categories.values())
            images = {i["id"]: i for i in _checked_entries(content, "images", "id")}
            names = [categories[key] for key in sorted(categories)] if classes is None else classes
            annotations = _checked_entries(content, "annotations", "category_id", "image_id")
            by_picture = _group_objects(annotations, images, categories, names)
            files = {key: str(image["file_name"]) for key, image in images.items()}
        except KeyError as error:
            raise ValueError(f"{path}: there is no {error}.") from error
        except (TypeError, *_INVALID) as error:
            message = f"{path}: {first_line(error, 500).rstrip('.')}."
            raise ArgumentError(message, getattr(error, "argument", "root")) from error
        check_inside(path, files.values())
        kept = [
            (image, target, objects)
            for (image, target), objects in sorted(by_picture.items())
            if not all(object_.is_crowd for object_ in objects)
        ]
        if not kept:
            raise ValueError(f"{path}: the pictures have no object.")
        keys = [f"{Path(files[image]).with_suffix('')}-{names[t]}" for image, t, _ in kept]
        check_unique(path, keys)
        super().__init__([(folder / files[image], t) for image, t, _ in kept], keys, names)
        self.root, self.split, self._path = root, split, path
        self._objects = [objects for _, _, objects in kept]

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return any(folder.glob("annotations/instances_*.json"))

    def _make_example(self, index: int, image: "Image", target: int, name: str) -> Example:
        objects = [object_ for object_ in self._objects[index] if not object_.is_crowd]
        crowds = [object_ for object_ in self._objects[index] if object_.is_crowd]
        boxes = clip_boxes([object_.box for object_ in objects], image.size, name)
        title = f"{self._path}: the segmentation of {name}"
        mask = _union_mask(objects, image.size, title)
        ignored = _union_mask(crowds, image.size, title)
        if mask is not None and ignored is not None:
            ignored = ignored & ~mask
        return Example(image, target, name, boxes, mask, ignored)


def _check_classes(classes: Any) -> None:
    names = list(classes) if isinstance(classes, Sequence) else []
    if isinstance(classes, str) or not all(isinstance(name, str) for name in names) or not names:
        raise ArgumentError(
            f"`classes` must be a list of names, got {bounded_repr(classes)}.", "classes"
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ArgumentError(
            f"`classes` must be distinct names, got {first_of(repeated)} more than once.", "classes"
        )


def _checked_entries(content: Mapping[str, Any], key: str, *ids: str) -> list[Mapping[str, Any]]:
    """The list `key` of a file; its entries are objects with numbers or texts as `ids`."""
    entries = content[key]
    if not isinstance(entries, list):
        raise ValueError(f"{key!r} must be a list of objects, got {bounded_repr(entries)}")
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"{key!r} must be a list of objects, got the entry {bounded_repr(entry)}"
            )
        for name in ids:
            if not isinstance(entry[name], int | float | str):
                raise ValueError(
                    f"{name!r} in {key!r} must be a number, got {bounded_repr(entry[name])}"
                )
    return entries


def _group_objects(
    annotations: Any, images: Mapping[int, Any], categories: Mapping[int, str], names: Sequence[str]
) -> dict[tuple[int, int], list[_Object]]:
    """Group the objects whose box has an area by picture and class."""
    groups: dict[tuple[int, int], list[_Object]] = {}
    for annotation in annotations:
        x, y, width, height = _checked_box(annotation["bbox"])
        category, image = annotation["category_id"], annotation["image_id"]
        name = categories.get(category)
        if name is None or image not in images:
            raise ValueError(
                f"an object is of picture {bounded_repr(image)}, category {bounded_repr(category)}"
            )
        if name not in names:
            raise ArgumentError(f"the class {bounded_repr(name)} is not in `classes`", "classes")
        if width > 0 and height > 0:
            box = round_outwards(x, y, x + width, y + height)
            segmentation = annotation.get("segmentation") or None
            object_ = _Object(box, segmentation, bool(annotation.get("iscrowd")))
            groups.setdefault((image, names.index(name)), []).append(object_)
    return groups


def _checked_box(box: Any) -> list[float]:
    """The x, y, width and height of a box, all finite."""
    if not isinstance(box, list) or len(box) != 4 or not all(is_finite(value) for value in box):
        raise ValueError(
            f"a box must be four finite numbers, [x, y, width, height], got {bounded_repr(box)}"
        )
    return [float(value) for value in box]


# --- masks ---------------------------------------------------------------------------------------


def _union_mask(objects: Sequence[_Object], size: tuple[int, int], title: str) -> Tensor | None:
    """The pixels of objects in a picture of (width, height); None if one has no segmentation."""
    if not objects or any(object_.segmentation is None for object_ in objects):
        return None
    mask = np.zeros((size[1], size[0]), dtype=bool)
    try:
        for object_ in objects:
            mask |= _decode_mask(object_.segmentation, size[1], size[0])
    except (KeyError, TypeError, *_INVALID) as error:
        raise ValueError(f"{title} cannot be understood: {first_line(error, 500)}.") from error
    return torch.from_numpy(mask)


def _decode_mask(segmentation: Any, height: int, width: int) -> Array:
    """Decode polygons or run lengths to a mask (height, width), bool."""
    if isinstance(segmentation, Mapping):
        return _decode_runs(segmentation["counts"], segmentation["size"], height, width)
    if not isinstance(segmentation, list):
        raise ValueError(f"expected polygons or run lengths, got {bounded_repr(segmentation)}")
    for polygon in segmentation:
        if (
            not isinstance(polygon, list)
            or len(polygon) < 6
            or len(polygon) % 2
            or not all(is_finite(value) for value in polygon)
        ):
            raise ValueError(
                f"a polygon must be finite numbers, [x1, y1, x2, y2, ...], of at least three "
                f"corners, got {bounded_repr(polygon)}"
            )
    union = np.zeros((height, width), dtype=bool)
    for polygon in segmentation:
        union |= _fill_polygon(polygon, height, width)
    return union


def _fill_polygon(polygon: Sequence[float], height: int, width: int) -> Array:
    """Mark pixels whose centre is inside a polygon (x1, y1, x2, y2, ...), by the even-odd rule."""
    x, y = np.asarray(polygon, dtype=np.float64).clip(-_FAR, _FAR).reshape(-1, 2).T
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    rows = np.arange(height) + 0.5
    flips = np.zeros((height, width + 1), dtype=np.uint8)  # sums modulo 256 stay odd or even
    edges_at_once = max(_CHUNK // height, 1)
    for first_edge in range(0, len(x), edges_at_once):
        chunk = slice(first_edge, first_edge + edges_at_once)
        edge, row = np.nonzero((y[chunk, None] <= rows) != (next_y[chunk, None] <= rows))
        edge += first_edge
        slope = (next_x - x)[edge] / (next_y - y)[edge]
        crossing = x[edge] + (rows[row] - y[edge]) * slope
        first = np.ceil(crossing - 0.5).clip(0, width).astype(np.int64)  # the pixel after it
        np.add.at(flips, (row, first), 1)
    inside: Array = flips.cumsum(1, dtype=np.uint8)[:, :width] % 2 == 1
    return inside


def _decode_runs(counts: Any, size: Sequence[int], height: int, width: int) -> Array:
    """Decode run lengths, of pixels outside and inside in turn, down the columns."""
    runs = np.asarray(_decode_text(counts) if isinstance(counts, str) else counts, dtype=np.int64)
    pixels = height * width
    # No run is longer than the picture, so that the sum of a hostile file does not overflow.
    is_valid = list(size) == [height, width] and ((runs >= 0) & (runs <= pixels)).all()
    if not is_valid or runs.ndim != 1 or runs.sum() != pixels:
        raise ValueError(
            f"runs of {runs.sum()} pixels in a mask of size {bounded_repr(list(size))} do not fit "
            f"a picture of {[height, width]}"
        )
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _decode_text(text: str) -> list[int]:
    """Decode the run lengths in COCO's text.

    Each character holds five bits of a number, the lowest first. Bit 32 means that more follow, and
    bit 16 of the last character is the sign. From the fourth number on, the text holds differences
    from the last but one.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        if shift >= _LONGEST_RUN:
            raise ValueError(f"a run of more than {_LONGEST_RUN} bits")
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs
