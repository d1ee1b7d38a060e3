"""The layout of wsolevaluation, by which CUB, ImageNet and OpenImages30k are published."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from captum_ext.datasets._files import (
    AnyPath,
    LayoutFiles,
    check_keys,
    check_targets,
    check_unique,
    cut_off,
    finite_number,
    outwards,
    read_mask,
    read_rows,
    read_table,
)
from captum_ext.datasets.examples import Example

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("test", "val", "train-fullsup", "train-weaksup")


class WsolFolder(LayoutFiles):
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
        path = folder / "class_labels.txt"
        targets = read_table(path, 1, int, names, ",")
        check_targets(path, targets, 0, n_classes)
        samples = [(Path(images) / name, targets[name][0]) for name in names]
        super().__init__(samples, names, ())
        self.has_objects = localization
        self.masks = Path(images if masks is None else masks)
        self._sizes: dict[str, list[int]] = {}
        self._boxes: dict[str, list[list[float]]] = {}
        self._masks: dict[str, list[list[str]]] = {}
        if localization:
            self._read_localization(folder)

    @classmethod
    def from_folder(
        cls, root: str, images: str, split: str = "test", masks: str | None = None
    ) -> Self:
        """With what is known of the objects, where the folder has it."""
        has_objects = (Path(root) / split / "localization.txt").is_file()
        return cls(root, images, split, masks=masks, localization=has_objects)

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return any((folder / split / "image_ids.txt").is_file() for split in SPLITS)

    @property
    def n_classes(self) -> int:
        return 1 + max(target for _, target in self.samples)

    def _read_localization(self, folder: Path) -> None:
        path = folder / "localization.txt"
        lines = [line for (line,) in read_rows(path, lambda line: [line], 1)]
        n_values = 4 if lines and _is_box(lines[0]) else 2
        found: dict[str, list[list[str]]] = {}
        for key, *values in read_rows(path, lambda line: line.rsplit(",", n_values), n_values + 1):
            found.setdefault(key, []).append(values)
        check_keys(path, found, self.names)
        if n_values == 2:
            self._masks = found
            return
        try:
            self._boxes = {
                k: [[finite_number(v) for v in box] for box in b] for k, b in found.items()
            }
        except ValueError as error:
            raise ValueError(f"{path}: {error}.") from error
        self._sizes = read_table(folder / "image_sizes.txt", 2, _side_length, self.names, ",")

    def _example(self, place: int, image: "Image", target: int, name: str) -> Example:
        boxes = mask = ignored = None
        if name in self._boxes:
            x, y = (a / b for a, b in zip(image.size, self._sizes[name], strict=True))
            scaled = [outwards(a * x, b * y, c * x, d * y) for a, b, c, d in self._boxes[name]]
            boxes = cut_off(scaled, image.size, name)
        elif name in self._masks:
            inside, outside = (
                [read_mask(self.masks / path, image.size) for path in dict.fromkeys(paths) if path]
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
        raise ValueError(f"expected a number of pixels, got {text!r}")
    return value
