"""Pascal VOC's layout, after unpacking."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from torch import Tensor

from captum_ext._checks import first_line
from captum_ext._errors import ArgumentError
from captum_ext._repr import bounded_repr
from captum_ext.datasets._files import (
    AnyPath,
    Box,
    LayoutDataset,
    check_inside,
    check_unique,
    clip_boxes,
    finite_number,
    read_rows,
    round_outwards,
)
from captum_ext.datasets.examples import Example, is_difficult

if TYPE_CHECKING:
    from PIL.Image import Image

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class VocExample(Example):
    """A picture and one of the classes in it.

    Attributes:
        image: in RGB.
        target: the index of the class in the data set's `classes`.
        name: picture and class, as in "000012-car".
        boxes: (n, 4), int64: the boxes (x1, y1, x2, y2) of the objects that count, half-open.
        flagged_boxes: (m, 4), int64: the boxes of the objects of the class that the annotators
            flagged as "difficult" to see.
        other_targets: the other classes in the picture, flagged or not.
    """

    image: "Image"
    boxes: Tensor
    flagged_boxes: Tensor
    other_targets: tuple[int, ...]

    @property
    def difficult(self) -> bool:
        """True for one of the pointing game's difficult examples; see `is_difficult`.

        The flag of the annotators has another meaning, and belongs to single objects.
        """
        return is_difficult(self.boxes, self.size, len(self.other_targets))


class Voc(LayoutDataset):
    """Pascal VOC: an example for each picture and class in it, with the boxes of that class.

    The root holds ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``. Boxes in the files count
    pixels from 1 and include both ends; (xmin - 1, ymin - 1, xmax, ymax) is half-open from 0. The
    fractions in some files are rounded outwards.

    Args:
        root: a folder such as VOCdevkit/VOC2007.
        split: the name of a file in ``ImageSets/Main``, such as "test", "val" or "trainval".
        use_flagged: whether objects flagged as "difficult" count as objects, as in TorchRay's
            pointing game; they are then in `boxes` and in `flagged_boxes`. Otherwise a class with
            only flagged objects in a picture gives no example, as in VOC's own evaluation.
        classes: the names of the classes, in the order of the classifier's outputs.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        ValueError: invalid files, a class that is not in `classes`, no object.

    Reference:
        Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", 2010.

    Example:
        >>> example = Voc("VOCdevkit/VOC2007")[0]  # doctest: +SKIP
        >>> example.name, example.boxes.tolist(), example.difficult  # doctest: +SKIP
        ('000001-dog', [[47, 239, 195, 371]], True)
    """

    def __init__(
        self,
        root: AnyPath,
        split: str = "test",
        *,
        use_flagged: bool = False,
        classes: Sequence[str] = VOC_CLASSES,
    ) -> None:
        root = Path(root)
        self._objects: list[tuple[list[Box], list[Box], tuple[int, ...]]] = []
        samples, names = [], []
        listed = root / "ImageSets" / "Main" / f"{split}.txt"
        keys = [key for (key,) in read_rows(listed, str.split, 1)]
        check_inside(listed, keys)
        for key in keys:
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
        check_unique(listed, names)
        super().__init__(samples, names, classes)
        self.root, self.split, self.use_flagged = root, split, use_flagged

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return (folder / "Annotations").is_dir() and (folder / "ImageSets/Main").is_dir()

    def _make_example(self, index: int, image: "Image", target: int, name: str) -> VocExample:
        boxes, flagged, others = self._objects[index]
        return VocExample(
            image=image,
            target=target,
            name=name,
            boxes=clip_boxes(boxes, image.size, name),
            flagged_boxes=clip_boxes(flagged, image.size, name),
            other_targets=others,
        )


def _voc_objects(path: Path, classes: Sequence[str]) -> list[tuple[int, Box, bool]]:
    """Read the class, box and flag of each object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    objects = []
    try:
        parser = ElementTree.XMLParser(target=_TreeWithoutEntities())
        for element in ElementTree.parse(path, parser).getroot().findall("object"):
            name = str(element.findtext("name")).strip()
            if name not in classes:
                raise ArgumentError(
                    f"the class {bounded_repr(name)} is not in `classes`", "classes"
                )
            x1, y1, x2, y2 = (
                finite_number(str(element.findtext(f"bndbox/{end}")))
                for end in ("xmin", "ymin", "xmax", "ymax")
            )
            flagged = int(element.findtext("difficult") or 0) != 0
            objects.append((classes.index(name), round_outwards(x1 - 1, y1 - 1, x2, y2), flagged))
    except (ElementTree.ParseError, ValueError) as error:
        message = f"{path}: {first_line(error, 500)}."
        raise ArgumentError(message, getattr(error, "argument", "root")) from error
    return objects


class _TreeWithoutEntities(ElementTree.TreeBuilder):
    """Refuses a document type: entities in it can make a small file a large text."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("a document type is not allowed")
