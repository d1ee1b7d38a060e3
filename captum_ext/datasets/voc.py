"""Pascal VOC, as it is unpacked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from torch import Tensor

from captum_ext.datasets._files import (
    AnyPath,
    Box,
    LayoutFiles,
    check_unique,
    cut_off,
    finite_number,
    outwards,
    read_rows,
)
from captum_ext.datasets.examples import Example, is_difficult

if TYPE_CHECKING:
    from PIL.Image import Image

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


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


class Voc(LayoutFiles):
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
        root: AnyPath,
        split: str = "test",
        *,
        use_flagged: bool = False,
        classes: Sequence[str] = VOC_CLASSES,
    ) -> None:
        root = Path(root)
        self._objects: list[tuple[list[Box], list[Box], tuple[int, ...]]] = []
        samples, names = [], []
        for (key,) in read_rows(root / "ImageSets" / "Main" / f"{split}.txt", str.split, 1):
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
        check_unique(root / "ImageSets" / "Main" / f"{split}.txt", names)
        super().__init__(samples, names, classes)

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return (folder / "Annotations").is_dir() and (folder / "ImageSets/Main").is_dir()

    def _example(self, place: int, image: "Image", target: int, name: str) -> VocExample:
        boxes, flagged, others = self._objects[place]
        return VocExample(
            image=image,
            target=target,
            name=name,
            boxes=cut_off(boxes, image.size, name),
            flagged_boxes=cut_off(flagged, image.size, name),
            other_targets=others,
        )


def _voc_objects(path: Path, classes: Sequence[str]) -> list[tuple[int, Box, bool]]:
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
                finite_number(str(found.findtext(f"bndbox/{end}")))
                for end in ("xmin", "ymin", "xmax", "ymax")
            )
            flagged = int(found.findtext("difficult") or 0) != 0
            objects.append((classes.index(name), outwards(x1 - 1, y1 - 1, x2, y2), flagged))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: {error}.") from error
    return objects
