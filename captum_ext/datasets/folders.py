"""Pictures in folders, in the layouts of public data sets, each read as `Example`.

Nothing is downloaded. What a layout's text files say is checked when a data set is made; pictures
and masks are read when they are asked for. One that is missing or does not decode raises an OSError
that names it. Boxes are cut off at the image's border.

Except by `ClassFolders`, pictures are taken as they are stored: a turn that the camera has noted
(EXIF) is not made, since the boxes of these sets are in the stored pixels.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_ext._checks import check_choice
from captum_ext.datasets.examples import Example, is_difficult

if TYPE_CHECKING:
    from PIL.Image import Image

N_CUB_CLASSES = 200
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)

_Path = str | Path
_Box = tuple[int, int, int, int]
_T = TypeVar("_T")


class _Files(Dataset[Example]):
    """Examples whose names and classes are known before their pictures are read.

    Attributes:
        samples: the file of each picture and its class, as torchvision's folders have them.
        names: of the examples.
        classes: the names of the classes, where the layout has them.
    """

    def __init__(
        self, samples: Sequence[tuple[_Path, int]], names: Sequence[str], classes: Sequence[str]
    ) -> None:
        self.samples = [(str(path), target) for path, target in samples]
        self.names, self.classes = list(names), tuple(classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        place = self._checked(index)
        path, target = self.samples[place]
        return self._example(place, self._image(path), target, self.names[place])

    def target(self, index: int) -> int:
        """The class of an example, without reading its picture."""
        return self.samples[self._checked(index)][1]

    def name(self, index: int) -> str:
        """The name of an example, without reading its picture."""
        return self.names[self._checked(index)]

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return index % len(self)

    def _image(self, path: str) -> "Image":
        return _read(path, "RGB")

    def _example(self, place: int, image: "Image", target: int, name: str) -> Example:
        """With what is known of the object."""
        return Example(image, target, name)


# --- a folder for each class ---------------------------------------------------------------------


class ClassFolders(_Files):
    """Pictures in one folder for each class: ``<root>/<class>/<any folders>/<picture>``.

    The pictures are those of torchvision's `ImageFolder`, in its order. They are turned upright, as
    by `captum-ext explain`. Nothing is known of where the objects are. Names are paths under the
    root.

    Args:
        root: the folder.
        classes: names of folders, in the order of the classifier's outputs. Not all of them need to
            be there, so that some classes of ImageNet can be evaluated alone. None takes the
            folders that are there, sorted.

    Raises:
        FileNotFoundError: no folder, no class, or a class without pictures.
        ValueError: a folder that is not in `classes`.

    Example:
        >>> data = ClassFolders("photographs")  # doctest: +SKIP
        >>> data[0].name, data[0].target, data.classes  # doctest: +SKIP
        ('cat/1.jpg', 0, ('cat', 'dog'))
    """

    def __init__(self, root: _Path, classes: Sequence[str] | None = None) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

        found, _ = find_classes(str(root))
        classes = found if classes is None else classes
        unknown = sorted(set(found).difference(classes))
        if unknown:
            raise ValueError(f"`classes` lacks {_some(unknown)}, which are folders of {root}.")
        places = {name: classes.index(name) for name in found}
        samples = make_dataset(str(root), places, extensions=IMG_EXTENSIONS)
        names = [Path(path).relative_to(root).as_posix() for path, _ in samples]
        super().__init__(samples, names, classes)

    def _image(self, path: str) -> "Image":
        from captum_ext.demo import InputError, load_image

        try:
            return load_image(path)
        except InputError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
                raise error.__cause__ from None
            raise OSError(str(error)) from error


# --- CUB-200-2011 --------------------------------------------------------------------------------


class Cub(_Files):
    """Caltech-UCSD Birds-200-2011: 200 species, one bird and one box in each picture.

    The root holds ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``,
    ``bounding_boxes.txt`` and the folder ``images``, and may hold ``classes.txt``. Classes count
    from 0 here, from 1 in the files. Boxes are x, y, width and height there, from 0, and become
    half-open; fractions are rounded outwards. Names are those of ``images.txt``.

    Args:
        root: the folder CUB_200_2011.
        split: "test", "train" or "all".
        masks: whether to read the folder ``segmentations``, an archive of its own that is unpacked
            into the root. They are grey by how many of five annotators saw the bird there; a pixel
            is of the bird if more than half of them did.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        ValueError: files that do not fit together, a class out of range, no picture.

    Reference:
        Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", 2011.

    Example:
        >>> example = Cub("CUB_200_2011", masks=True)[0]  # doctest: +SKIP
        >>> example.name, example.boxes.shape, example.mask.shape  # doctest: +SKIP
        ('001.Black_footed_Albatross/...46_18.jpg', torch.Size([1, 4]), torch.Size([358, 450]))
    """

    def __init__(self, root: _Path, split: str = "test", masks: bool = False) -> None:
        check_choice("split", split, ("test", "train", "all"))
        root = Path(root)
        listed = _table(root / "images.txt", 1, str)
        targets = _table(root / "image_class_labels.txt", 1, int, listed)
        in_train = _table(root / "train_test_split.txt", 1, int, listed)
        corners = _table(root / "bounding_boxes.txt", 4, _finite, listed)
        classes = _cub_classes(root)
        _check_targets(root / "image_class_labels.txt", targets, 1, len(classes) or N_CUB_CLASSES)
        if masks and not (root / "segmentations").is_dir():
            raise FileNotFoundError(f"`masks` need the folder {root / 'segmentations'}.")
        wanted = {"test": (0,), "train": (1,), "all": (0, 1)}[split]
        kept = [key for key in listed if in_train[key][0] in wanted]
        if not kept:
            raise ValueError(f"{root / 'train_test_split.txt'} has no picture of {split!r}.")
        names = [listed[key][0] for key in kept]
        samples = [(root / "images" / listed[key][0], targets[key][0] - 1) for key in kept]
        super().__init__(samples, names, classes)
        self.root, self.has_masks = root, masks
        edges = [corners[key] for key in kept]
        self._boxes = [_outwards(x, y, x + w, y + h) for x, y, w, h in edges]

    def _example(self, place: int, image: "Image", target: int, name: str) -> Example:
        mask = None
        if self.has_masks:
            path = (self.root / "segmentations" / name).with_suffix(".png")
            mask = _read_mask(path, image.size, above=127)
        boxes = _cut_off([self._boxes[place]], image.size, name)
        return Example(image, target, name, boxes, mask)


def _cub_classes(root: Path) -> tuple[str, ...]:
    path = root / "classes.txt"
    return tuple(name for (name,) in _table(path, 1, str).values()) if path.is_file() else ()


# --- Pascal VOC ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class VocExample(Example):
    """A picture and one of the classes in it.

    Attributes:
        image: in RGB.
        target: the class, as its index in `VOC_CLASSES`.
        name: picture and class, as in "000012-car".
        boxes: (n, 4), int64: of the objects of the class that count, (x1, y1, x2, y2), half-open.
        flagged_boxes: (m, 4), int64: of those that the annotators flagged as "difficult" to see.
        other_targets: the other classes in the picture, flagged or not.
    """

    image: "Image"
    boxes: Tensor
    flagged_boxes: Tensor
    other_targets: tuple[int, ...]

    @property
    def difficult(self) -> bool:
        """Whether this is one of the pointing game's difficult examples: see `is_difficult`.

        It has nothing to do with the flag of the annotators, which is of single objects.
        """
        return is_difficult(self.boxes, self.size, len(self.other_targets))


class Voc(_Files):
    """Pascal VOC: an example for each picture and class in it, with the boxes of that class.

    The root holds ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``. Boxes count pixels from 1
    there and include both ends; (xmin - 1, ymin - 1, xmax, ymax) is half-open from 0. Some files
    have fractions, which are rounded outwards.

    Args:
        root: a folder such as VOCdevkit/VOC2007.
        split: the name of a file in ``ImageSets/Main``, such as "test", "val" or "trainval".
        use_flagged: whether objects flagged as "difficult" count as objects, as they do in
            TorchRay's pointing game; they are in `boxes` and in `flagged_boxes` then. Else a class
            of which a picture has no others gives no example, as in VOC's own evaluation.
        classes: the names of the classes, in the order of the classifier's outputs.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        ValueError: files that cannot be understood, a class that is not in `classes`, no object.

    Reference:
        Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", 2010.

    Example:
        >>> example = Voc("VOCdevkit/VOC2007")[0]  # doctest: +SKIP
        >>> example.name, example.boxes.tolist(), example.difficult  # doctest: +SKIP
        ('000001-dog', [[47, 239, 195, 371]], True)
    """

    def __init__(
        self,
        root: _Path,
        split: str = "test",
        *,
        use_flagged: bool = False,
        classes: Sequence[str] = VOC_CLASSES,
    ) -> None:
        root = Path(root)
        self._objects: list[tuple[list[_Box], list[_Box], tuple[int, ...]]] = []
        samples, names = [], []
        for (key,) in _rows(root / "ImageSets" / "Main" / f"{split}.txt", _words, 1):
            objects = _voc_objects(root / "Annotations" / f"{key}.xml", classes)
            present = sorted({target for target, _, _ in objects})
            for target in present:
                flagged = [box for t, box, is_flagged in objects if t == target and is_flagged]
                boxes = [box for t, box, out in objects if t == target and (use_flagged or not out)]
                if boxes:
                    others = tuple(other for other in present if other != target)
                    self._objects.append((boxes, flagged, others))
                    samples.append((root / "JPEGImages" / f"{key}.jpg", target))
                    names.append(f"{key}-{classes[target]}")
        if not samples:
            raise ValueError(f"{root}: the pictures of {split!r} have no object.")
        _check_unique(root / "ImageSets" / "Main" / f"{split}.txt", names)
        super().__init__(samples, names, classes)

    def _example(self, place: int, image: "Image", target: int, name: str) -> VocExample:
        boxes, flagged, others = self._objects[place]
        return VocExample(
            image=image,
            target=target,
            name=name,
            boxes=_cut_off(boxes, image.size, name),
            flagged_boxes=_cut_off(flagged, image.size, name),
            other_targets=others,
        )


def _voc_objects(path: Path, classes: Sequence[str]) -> list[tuple[int, _Box, bool]]:
    """Class, box and flag of each object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    objects = []
    try:
        for found in ElementTree.parse(path).getroot().findall("object"):
            name = str(found.findtext("name")).strip()
            if name not in classes:
                raise ValueError(f"the class {name!r} is not in `classes`")
            x1, y1, x2, y2 = (
                _finite(str(found.findtext(f"bndbox/{end}")))
                for end in ("xmin", "ymin", "xmax", "ymax")
            )
            flagged = int(found.findtext("difficult") or 0) != 0
            objects.append((classes.index(name), _outwards(x1 - 1, y1 - 1, x2, y2), flagged))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: {error}.") from error
    return objects


# --- wsolevaluation ------------------------------------------------------------------------------


class WsolFolder(_Files):
    """The layout of wsolevaluation, by which CUB, ImageNet and OpenImages30k are published.

    ``<root>/<split>`` holds ``image_ids.txt``, ``class_labels.txt``, ``localization.txt`` and, with
    boxes, ``image_sizes.txt``. A line of ``localization.txt`` is ``id,x1,y1,x2,y2``: an image has
    one or more, which end behind the object, so that they are taken as half-open. They are in
    pixels of an image of the size in ``image_sizes.txt`` (``id,width,height``); where a picture has
    another, they are scaled and rounded outwards. Or a line is ``id,mask,ignored``, paths of
    pictures whose pixels that are not 0 count: the mask is the union of an image's masks, what is
    ignored is the rest of the other, which may be empty. They are brought to the size of the image
    (nearest). Names are the ids, which are the pictures' paths.

    Args:
        root: the folder of the text files, such as metadata/CUB.
        images: the folder of the pictures, such as dataset/CUB.
        split: "test", "val" or "train-fullsup"; "train-weaksup" with ``localization=False``.
        masks: the folder of the masks; None is `images`.
        localization: whether to read ``localization.txt``.
        n_classes: classes must be below it; None checks only that they are not negative.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        ValueError: files that do not fit together, a class out of range, no picture.

    Reference:
        Choe et al., https://github.com/clovaai/wsolevaluation

    Example:
        >>> example = WsolFolder("metadata/CUB", "dataset/CUB")[0]  # doctest: +SKIP
        >>> example.boxes.tolist()  # doctest: +SKIP
        [[60, 27, 385, 331]]
    """

    def __init__(
        self,
        root: _Path,
        images: _Path,
        split: str = "test",
        *,
        masks: _Path | None = None,
        localization: bool = True,
        n_classes: int | None = None,
    ) -> None:
        folder = Path(root) / split
        names = [name for (name,) in _rows(folder / "image_ids.txt", lambda line: [line], 1)]
        if not names:
            raise ValueError(f"{folder / 'image_ids.txt'} has no picture.")
        _check_unique(folder / "image_ids.txt", names)
        path = folder / "class_labels.txt"
        targets = _table(path, 1, int, names, ",")
        _check_targets(path, targets, 0, n_classes)
        samples = [(Path(images) / name, targets[name][0]) for name in names]
        super().__init__(samples, names, ())
        self.masks = Path(images if masks is None else masks)
        self._sizes: dict[str, list[int]] = {}
        self._boxes: dict[str, list[list[float]]] = {}
        self._masks: dict[str, list[list[str]]] = {}
        if localization:
            self._read_localization(folder)

    def _read_localization(self, folder: Path) -> None:
        path = folder / "localization.txt"
        lines = [line for (line,) in _rows(path, lambda line: [line], 1)]
        n_values = 4 if lines and _is_box(lines[0]) else 2
        found: dict[str, list[list[str]]] = {}
        for key, *values in _rows(path, lambda line: line.rsplit(",", n_values), n_values + 1):
            found.setdefault(key, []).append(values)
        _check_keys(path, found, self.names)
        if n_values == 2:
            self._masks = found
            return
        try:
            self._boxes = {k: [[_finite(v) for v in box] for box in b] for k, b in found.items()}
        except ValueError as error:
            raise ValueError(f"{path}: {error}.") from error
        self._sizes = _table(folder / "image_sizes.txt", 2, _side, self.names, ",")

    def _example(self, place: int, image: "Image", target: int, name: str) -> Example:
        boxes = mask = ignored = None
        if name in self._boxes:
            x, y = (a / b for a, b in zip(image.size, self._sizes[name], strict=True))
            scaled = [_outwards(a * x, b * y, c * x, d * y) for a, b, c, d in self._boxes[name]]
            boxes = _cut_off(scaled, image.size, name)
        elif name in self._masks:
            inside, outside = (
                [_read_mask(self.masks / path, image.size) for path in dict.fromkeys(paths) if path]
                for paths in zip(*self._masks[name], strict=True)
            )
            if not inside:
                raise ValueError(f"localization.txt names no mask of {name}.")
            mask = torch.stack(inside).any(0)
            ignored = torch.stack(outside).any(0) & ~mask if outside else None
        return Example(image, target, name, boxes, mask, ignored)


def _is_box(line: str) -> bool:
    try:
        return len([float(value) for value in line.rsplit(",", 4)[1:]]) == 4
    except ValueError:
        return False


# --- text files ----------------------------------------------------------------------------------


def _words(line: str) -> list[str]:
    return line.split()


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected a number, got {text!r}")
    return value


def _side(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"expected a number of pixels, got {text!r}")
    return value


def _rows(path: Path, split: Callable[[str], list[str]], n: int) -> list[list[str]]:
    """The fields of each line of a file that is not empty: n of them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        fields = split(line)
        if len(fields) != n:
            raise ValueError(f"{path}, line {number}: expected {n} fields, got {line!r}.")
        rows.append(fields)
    return rows


def _table(
    path: Path,
    n: int,
    kind: Callable[[str], _T],
    keys: Iterable[str] | None = None,
    separator: str | None = None,
) -> dict[str, list[_T]]:
    """The n values that follow the key on each line; one line for each of `keys`, if given."""

    def split(line: str) -> list[str]:
        return line.split(None, n) if separator is None else line.rsplit(separator, n)

    rows = _rows(path, split, n + 1)
    _check_unique(path, [key for key, *_ in rows])
    try:
        table = {key: [kind(value.strip()) for value in values] for key, *values in rows}
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error
    if keys is not None:
        _check_keys(path, table, keys)
    return table


def _check_keys(path: Path, found: Iterable[str], keys: Iterable[str]) -> None:
    """Raise unless a file is about just those pictures that are listed."""
    there, wanted = set(found), set(keys)
    if there != wanted:
        lacking, unknown = sorted(wanted - there), sorted(there - wanted)
        parts = [f"lacks {_some(lacking)}"] if lacking else []
        parts += [f"has {_some(unknown)}"] if unknown else []
        raise ValueError(
            f"{path} must have each of the {len(wanted)} pictures that are listed, and no "
            f"other; it {' and '.join(parts)}."
        )


def _check_unique(path: Path, keys: Iterable[str]) -> None:
    twice = [key for key, n in Counter(keys).items() if n > 1]
    if twice:
        raise ValueError(f"{path} has {_some(twice)} more than once.")


def _check_targets(path: Path, table: dict[str, list[int]], first: int, n: int | None) -> None:
    end = math.inf if n is None else first + n
    wrong = [key for key, (target,) in table.items() if not first <= target < end]
    if wrong:
        allowed = f"from {first} on" if n is None else f"from {first} to {first + n - 1}"
        raise ValueError(
            f"{path}: the class of {wrong[0]} is {table[wrong[0]][0]}; classes must be {allowed}."
        )


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(map(repr, keys[:3]))
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


# --- boxes and pictures --------------------------------------------------------------------------


def _outwards(x1: float, y1: float, x2: float, y2: float) -> _Box:
    """The whole pixels that a box touches; 1e-6 of one is no more than rounding."""
    x1, y1, x2, y2 = (round(value, 6) for value in (x1, y1, x2, y2))
    return math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)


def _cut_off(boxes: Sequence[_Box], size: tuple[int, int], name: str) -> Tensor:
    """Boxes (n, 4) inside an image of (width, height)."""
    found = torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4)
    inside = found.clamp(min=torch.tensor(0), max=torch.tensor(size).repeat(2))
    if not bool((inside[:, :2] < inside[:, 2:]).all()):
        raise ValueError(
            f"a box of {name} is empty or outside the image of {size[0]} x {size[1]} pixels: "
            f"{found.tolist()}."
        )
    return inside


def _read_mask(path: Path, size: tuple[int, int], above: int = 0) -> Tensor:
    """Which pixels of a grey picture, brought to (width, height), are above a value: (H, W)."""
    from PIL import Image

    image = _read(path, "L")
    if image.size != size:
        image = image.resize(size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(image) > above)


def _read(path: _Path, mode: str) -> "Image":
    """A picture; an OSError that names it where that fails."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except MemoryError:
        raise
    except Exception as error:  # a broken file raises anything, from SyntaxError to struct.error
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise OSError(f"{path} cannot be read as an image: {error}") from error
