"""CUB-200-2011's layout, after unpacking."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

from captum_ext._checks import check_choice
from captum_ext.datasets._files import (
    AnyPath,
    LayoutDataset,
    check_inside,
    check_targets,
    clip_boxes,
    finite_number,
    read_mask,
    read_table,
    round_outwards,
)
from captum_ext.datasets.examples import Example

if TYPE_CHECKING:
    from PIL.Image import Image

N_CUB_CLASSES = 200


class Cub(LayoutDataset):
    """Caltech-UCSD Birds-200-2011: 200 species, one bird and one box in each picture.

    The root holds ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``,
    ``bounding_boxes.txt`` and the folder ``images``, and may hold ``classes.txt``. Classes count
    from 0 here, and from 1 in the files. Boxes in the files are x, y, width and height, from 0.
    They become half-open, and fractions are rounded outwards. Names are those of ``images.txt``.

    Args:
        root: the folder CUB_200_2011.
        split: "test", "train" or "all".
        masks: whether to read the folder ``segmentations``, a separate archive that is unpacked
            into the root. Its grey values count how many of five annotators saw the bird. A pixel
            belongs to the bird if more than half of them did.

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

    def __init__(self, root: AnyPath, split: str = "test", masks: bool = False) -> None:
        check_choice("split", split, ("test", "train", "all"))
        root = Path(root)
        listed = read_table(root / "images.txt", 1, str)
        check_inside(root / "images.txt", (name for (name,) in listed.values()))
        targets = read_table(root / "image_class_labels.txt", 1, int, listed)
        in_train = read_table(root / "train_test_split.txt", 1, int, listed)
        edges = read_table(root / "bounding_boxes.txt", 4, finite_number, listed)
        classes = _cub_classes(root)
        check_targets(root / "image_class_labels.txt", targets, 1, len(classes) or N_CUB_CLASSES)
        if masks and not (root / "segmentations").is_dir():
            raise FileNotFoundError(f"`masks` needs the folder {root / 'segmentations'}.")
        wanted = {"test": (0,), "train": (1,), "all": (0, 1)}[split]
        kept = [key for key in listed if in_train[key][0] in wanted]
        if not kept:
            raise ValueError(f"{root / 'train_test_split.txt'} has no picture of {split!r}.")
        names = [listed[key][0] for key in kept]
        samples = [(root / "images" / listed[key][0], targets[key][0] - 1) for key in kept]
        super().__init__(samples, names, classes)
        self.root, self.split, self.masks = root, split, masks
        self._boxes = [
            round_outwards(x, y, x + w, y + h) for x, y, w, h in (edges[key] for key in kept)
        ]

    @classmethod
    def from_folder(cls, root: str, split: str = "test") -> Self:
        """Open a folder, with masks if it has them."""
        return cls(root, split, masks=(Path(root) / "segmentations").is_dir())

    @classmethod
    def matches(cls, folder: Path) -> bool:
        names = ("images", "image_class_labels")
        return all((folder / f"{name}.txt").is_file() for name in names)

    @property
    def n_classes(self) -> int:
        return len(self.classes) or N_CUB_CLASSES

    def _make_example(self, index: int, image: "Image", target: int, name: str) -> Example:
        mask = None
        if self.masks:
            path = (Path(self.root) / "segmentations" / name).with_suffix(".png")
            mask = read_mask(path, image.size, above=0.5)
        boxes = clip_boxes([self._boxes[index]], image.size, name)
        return Example(image, target, name, boxes, mask)


def _cub_classes(root: Path) -> tuple[str, ...]:
    path = root / "classes.txt"
    return tuple(name for (name,) in read_table(path, 1, str).values()) if path.is_file() else ()
