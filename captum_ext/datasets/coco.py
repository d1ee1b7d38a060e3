"""COCO, as it is unpacked, or any other set with its `instances_*.json`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_ext._checks import is_finite
from captum_ext.datasets._files import (
    AnyPath,
    Box,
    LayoutFiles,
    check_unique,
    cut_off,
    outwards,
    some_of,
)
from captum_ext.datasets.examples import Example

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, Any]


class _Object(NamedTuple):
    box: Box
    segmentation: Any  # polygons, run lengths, or None
    is_crowd: bool


class Coco(LayoutFiles):
    """COCO: an example for each picture and class in it, with the boxes and the mask of that class.

    The root holds ``annotations/instances_<split>.json`` and the pictures, in the folder
    ``<split>`` or ``images``. Boxes are x, y, width and height there, from 0, and become half-open;
    fractions are rounded outwards. The mask is the union of the objects' segmentations, where each
    has one: polygons (a pixel is inside if its centre is, by the even-odd rule; several are
    united), or run lengths, as numbers or as COCO's text. Crowds are no objects: their pixels are
    ignored, and a class of which a picture has nothing else gives no example. Nor are objects whose
    box has no area, of which COCO has a few.

    Run lengths are read as pycocotools reads them. Of polygons about 0.4% of an object's pixels
    differ, along its border: there corners are rounded to a fifth of a pixel.

    Args:
        root: the folder.
        split: such as "val2017".
        classes: the names of the classes, in the order of the classifier's outputs. None takes
            those of the file, in the order of their ids: COCO's 80.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        ValueError: a file that cannot be understood, a class that is not in `classes`, no object;
            `classes` that are no distinct names.

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
                raise ValueError(f"expected an object, got {_shown(content)}")
            categories = {c["id"]: str(c["name"]) for c in _entries(content, "categories", "id")}
            check_unique(path, categories.values())
            images = {i["id"]: i for i in _entries(content, "images", "id")}
            names = [categories[key] for key in sorted(categories)] if classes is None else classes
            found = _objects(
                _entries(content, "annotations", "category_id", "image_id"),
                images,
                categories,
                names,
            )
            files = {key: str(image["file_name"]) for key, image in images.items()}
        except KeyError as error:
            raise ValueError(f"{path}: there is no {error}.") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {str(error).rstrip('.')}.") from error
        kept = [
            (image, target, objects)
            for (image, target), objects in sorted(found.items())
            if not all(one.is_crowd for one in objects)
        ]
        if not kept:
            raise ValueError(f"{path}: the pictures have no object.")
        keys = [f"{Path(files[image]).with_suffix('')}-{names[t]}" for image, t, _ in kept]
        check_unique(path, keys)
        super().__init__([(folder / files[image], t) for image, t, _ in kept], keys, names)
        self._objects = [objects for _, _, objects in kept]
        self._path = path

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return any(folder.glob("annotations/instances_*.json"))

    def _example(self, place: int, image: "Image", target: int, name: str) -> Example:
        objects = [one for one in self._objects[place] if not one.is_crowd]
        crowds = [one for one in self._objects[place] if one.is_crowd]
        boxes = cut_off([one.box for one in objects], image.size, name)
        where = f"{self._path}: the segmentation of {name}"
        mask = _union(objects, image.size, where)
        ignored = _union(crowds, image.size, where)
        if mask is not None and ignored is not None:
            ignored = ignored & ~mask
        return Example(image, target, name, boxes, mask, ignored)


def _check_classes(classes: Any) -> None:
    names = list(classes) if isinstance(classes, Sequence) else []
    if isinstance(classes, str) or not all(isinstance(name, str) for name in names) or not names:
        raise ValueError(f"`classes` must be a list of names, got {_shown(classes)}.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"`classes` must be distinct names, got {some_of(twice)} more than once.")


def _entries(content: Mapping[str, Any], key: str, *ids: str) -> list[Mapping[str, Any]]:
    """A list of the file, each entry an object with numbers (or texts) that identify it."""
    entries = content[key]
    if not isinstance(entries, list):
        raise ValueError(f"{key!r} must be a list of objects, got {_shown(entries)}")
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise ValueError(f"{key!r} must be a list of objects, got the entry {_shown(entry)}")
        for name in ids:
            if not isinstance(entry[name], int | float | str):
                raise ValueError(f"{name!r} in {key!r} must be a number, got {_shown(entry[name])}")
    return entries


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _objects(
    annotations: Any, images: Mapping[int, Any], categories: Mapping[int, str], names: Sequence[str]
) -> dict[tuple[int, int], list[_Object]]:
    """Those with a box of some area, by picture and class."""
    found: dict[tuple[int, int], list[_Object]] = {}
    for one in annotations:
        x, y, width, height = _numbers_of(one["bbox"])
        name, image = categories.get(one["category_id"]), one["image_id"]
        if name is None or image not in images:
            raise ValueError(f"an object is of picture {image}, category {one['category_id']}")
        if name not in names:
            raise ValueError(f"the class {name!r} is not in `classes`")
        if width > 0 and height > 0:
            box, crowd = outwards(x, y, x + width, y + height), bool(one.get("iscrowd"))
            known = _Object(box, one.get("segmentation") or None, crowd)
            found.setdefault((image, names.index(name)), []).append(known)
    return found


def _numbers_of(box: Any) -> list[float]:
    """The x, y, width and height of a box."""
    if not isinstance(box, list) or len(box) != 4 or not all(is_finite(value) for value in box):
        raise ValueError(
            f"a box must be four finite numbers, [x, y, width, height], got {_shown(box)}"
        )
    return [float(value) for value in box]


# --- masks ---------------------------------------------------------------------------------------


def _union(objects: Sequence[_Object], size: tuple[int, int], where: str) -> Tensor | None:
    """The pixels of objects in a picture of (width, height); None where one is not known."""
    if not objects or any(one.segmentation is None for one in objects):
        return None
    try:
        masks = [_mask(one.segmentation, size[1], size[0]) for one in objects]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be understood: {error}.") from error
    return torch.from_numpy(np.logical_or.reduce(masks))


def _mask(segmentation: Any, height: int, width: int) -> Array:
    """(height, width), bool, of polygons or run lengths."""
    if isinstance(segmentation, Mapping):
        return _of_runs(segmentation["counts"], segmentation["size"], height, width)
    if not isinstance(segmentation, list):
        raise ValueError(f"expected polygons or run lengths, got {_shown(segmentation)}")
    for each in segmentation:
        if (
            not isinstance(each, list)
            or len(each) < 6
            or len(each) % 2
            or not all(is_finite(value) for value in each)
        ):
            raise ValueError(
                f"a polygon must be finite numbers, [x1, y1, x2, y2, ...], of at least three "
                f"corners, got {_shown(each)}"
            )
    polygons = [_of_polygon(each, height, width) for each in segmentation]
    united: Array = np.logical_or.reduce(polygons)
    return united


def _of_polygon(polygon: Sequence[float], height: int, width: int) -> Array:
    """Pixels whose centres are inside of a polygon (x1, y1, x2, y2, ...), by the even-odd rule."""
    x, y = np.asarray(polygon, dtype=np.float64).reshape(-1, 2).T
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    rows = np.arange(height) + 0.5
    edge, row = np.nonzero((y[:, None] <= rows) != (next_y[:, None] <= rows))
    slope = (next_x - x)[edge] / (next_y - y)[edge]
    crossing = x[edge] + (rows[row] - y[edge]) * slope
    first = np.ceil(crossing - 0.5).clip(0, width).astype(np.int64)  # pixel behind the crossing
    flips = np.zeros((height, width + 1), dtype=np.int64)
    np.add.at(flips, (row, first), 1)
    inside: Array = flips.cumsum(1)[:, :width] % 2 == 1
    return inside


def _of_runs(counts: Any, size: Sequence[int], height: int, width: int) -> Array:
    """Runs of pixels outside and inside in turn, down the columns."""
    runs = np.asarray(_numbers(counts) if isinstance(counts, str) else counts, dtype=np.int64)
    if list(size) != [height, width] or runs.sum() != height * width or (runs < 0).any():
        raise ValueError(
            f"runs of {runs.sum()} pixels in a mask of size {list(size)} are not of a picture of "
            f"{[height, width]}"
        )
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _numbers(text: str) -> list[int]:
    """The run lengths of COCO's text: from the fourth on, differences from the last but one.

    A number has five bits in each character, the lowest first; 32 says that more follow, and 16
    of the last is the sign.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
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
