"""The layout of wsolevaluation, as used by published figures on CUB, ImageNet and OpenImages30k."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from captum_ext._checks import first_line
from captum_ext._repr import bounded_repr
from captum_ext.datasets._files import (
    AnyPath,
    LayoutDataset,
    check_inside,
    check_keys,
    check_targets,
    check_unique,
    clip_boxes,
    finite_number,
    read_mask,
    read_rows,
    read_table,
    round_outwards,
)
from captum_ext.datasets.examples import Example

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("test", "val", "train-fullsup", "train-weaksup")


class WsolFolder(LayoutDataset):
    """The layout of wsolevaluation, as used by published figures on CUB, ImageNet, OpenImages30k.

    ``<root>/<split>`` holds ``image_ids.txt``, ``class_labels.txt``, ``localization.txt`` and, with
    boxes, ``image_sizes.txt``. Names are the ids, which are the pictures' paths. There are two
    kinds of lines in ``localization.txt``:

    - ``id,x1,y1,x2,y2``: a box of an image, which has one or more. Boxes end behind the object, and
      are taken as half-open. They are in pixels of an image of the size in ``image_sizes.txt``
      (``id,width,height``). If the picture has another size, they are scaled and rounded outwards.
    - ``id,mask,ignored``: paths of pictures, whose pixels other than 0 count. The mask is the union
      of an image's masks. The ignored pixels are those of the second picture that are not in the
      mask; its path may be empty. Both are resized to the image (nearest).

    Args:
        root: the folder of the text files, such as metadata/CUB.
        images: the folder of the pictures, such as dataset/CUB.
        split: "test", "val" or "train-fullsup"; "train-weaksup" with ``localization=False``.
        masks: the folder of the masks; None takes `images`.
        localization: whether to read ``localization.txt``.
        n_classes: the number of classes, which labels must be below; None allows any label.

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

    labels = "used"

    def __init__(
        self,
        root: AnyPath,
        images: AnyPath,
        split: str = "test",
        *,
        masks: AnyPath | None = None,
        localization: bool = True,
        n_classes: int | None = None,
    ) -> None:
        folder = Path(root) / split
        names = [name for (name,) in read_rows(folder / "image_ids.txt", lambda line: [line], 1)]
        if not names:
            raise ValueError(f"{folder / 'image_ids.txt'} has no picture.")
        check_unique(folder / "image_ids.txt", names)
        check_inside(folder / "image_ids.txt", names)
        path = folder / "class_labels.txt"
        targets = read_table(path, 1, int, names, ",")
        check_targets(path, targets, 0, n_classes)
        samples = [(Path(images) / name, targets[name][0]) for name in names]
        super().__init__(samples, names, ())
        self.root, self.images, self.split, self.masks = root, images, split, masks
        self.localization = self.has_objects = localization
        self._sizes: dict[str, list[int]] = {}
        self._boxes: dict[str, list[list[float]]] = {}
        self._masks: dict[str, list[list[str]]] = {}
        if localization:
            self._read_localization(folder)

    @classmethod
    def from_folder(
        cls, root: str, images: str, split: str = "test", masks: str | None = None
    ) -> Self:
        """Open a folder, with boxes or masks if it has them."""
        has_objects = (Path(root) / split / "localization.txt").is_file()
        return cls(root, images, split, masks=masks, localization=has_objects)

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return any((folder / split / "image_ids.txt").is_file() for split in SPLITS)

    @property
    def n_classes(self) -> int:
        return 1 + max(target for _, target in self.samples)

    def _read_localization(self, folder: Path) -> None:
        path = folder / "localization.txt"
        lines = [line for (line,) in read_rows(path, lambda line: [line], 1)]
        n_values = 4 if lines and _is_box(lines[0]) else 2
        by_name: dict[str, list[list[str]]] = {}
        for key, *values in read_rows(path, lambda line: line.rsplit(",", n_values), n_values + 1):
            by_name.setdefault(key, []).append(values)
        check_keys(path, by_name, self.names)
        if n_values == 2:
            paths = itertools.chain.from_iterable(itertools.chain(*by_name.values()))
            check_inside(path, filter(None, paths))
            self._masks = by_name
            return
        try:
            self._boxes = {
                name: [[finite_number(value) for value in box] for box in boxes]
                for name, boxes in by_name.items()
            }
        except ValueError as error:
            raise ValueError(f"{path}: {first_line(error, 500)}.") from error
        self._sizes = read_table(folder / "image_sizes.txt", 2, _side_length, self.names, ",")

    def _make_example(self, index: int, image: "Image", target: int, name: str) -> Example:
        boxes = mask = ignored = None
        masks = Path(self.images if self.masks is None else self.masks)
        if name in self._boxes:
            sx, sy = (a / b for a, b in zip(image.size, self._sizes[name], strict=True))
            scaled = [
                round_outwards(x1 * sx, y1 * sy, x2 * sx, y2 * sy)
                for x1, y1, x2, y2 in self._boxes[name]
            ]
            boxes = clip_boxes(scaled, image.size, name)
        elif name in self._masks:
            inside, outside = (
                [read_mask(masks / path, image.size) for path in dict.fromkeys(paths) if path]
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


def _side_length(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"expected a number of pixels, got {bounded_repr(text)}")
    return value
