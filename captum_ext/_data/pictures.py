"""Data sets of pictures of any size, as tensors of bytes of one size; boxes in pictures."""

from collections.abc import Sized
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captum_ext._checks import warn
from captum_ext._data.files import UNREADABLE, is_resource_error
from captum_ext._data.pixels import resize_pixels, to_byte_tensor
from captum_ext._errors import ArgumentError
from captum_ext._identity import digest

N_PROBES = 16  # entries of a data set that enter its fingerprint


class PictureItem(NamedTuple):
    """An entry of a `PictureDataset`.

    Attributes:
        pixels: (3, H, W), uint8.
        label: the class.
        data_index: the picture's index in the data set.
        is_read: False if the picture could not be decoded. Then `pixels` are zeros.
    """

    pixels: Tensor
    label: int
    data_index: int
    is_read: bool


class PictureDataset(Dataset[PictureItem]):
    """Labelled pictures of any size, as bytes of one size.

    Args:
        data: a data set. Its entries are (picture, label, ...), or have the attributes `image` and
            `target`. Pictures are PIL images, or tensors (3, H, W) or (1, H, W) of bytes or of
            floats in [0, 1].
        size: (H, W).
        n_classes: the number of classes, if labels are to be checked.
        argument: the name of `data` in errors.
        has_labels: read labels. Without them, entries may also be single pictures.
    """

    def __init__(
        self,
        data: Any,
        size: tuple[int, int],
        n_classes: int | None = None,
        argument: str = "data",
        has_labels: bool = True,
    ) -> None:
        check_data(argument, data)
        self.data: Any = data
        self.size, self.n_classes, self.argument = size, n_classes, argument
        self.has_labels = has_labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> PictureItem:
        entry_and_pixels = self.read(index)
        if entry_and_pixels is None:
            return PictureItem(
                torch.zeros(3, *self.size, dtype=torch.uint8, device="cpu"), 0, index, False
            )
        entry, pixels = entry_and_pixels
        label = self._label(entry, index) if self.has_labels else 0
        if label < 0 or (self.n_classes is not None and label >= self.n_classes):
            raise ArgumentError(
                f"`{self.argument}`: the label of {self.name(index)} is {label}, and the "
                f"classifier has {self.n_classes} classes.",
                self.argument,
            )
        return PictureItem(resize_pixels(pixels, self.size), label, index, True)

    def read(self, index: int) -> tuple[Any, Tensor] | None:
        """Read an entry and its pixels, (3, H, W). None, and a warning, if it cannot be decoded."""
        try:
            entry = self.data[index]
            is_picture = isinstance(entry, Tensor | Image.Image)
            return entry, to_byte_tensor(entry if is_picture else self._field(entry, "image", 0))
        except UNREADABLE as error:
            if is_resource_error(error):
                raise
            warn(f"{self.name(index)} cannot be read and is left out: {error}")
            return None
        except (ValueError, TypeError) as error:
            raise type(error)(f"`{self.argument}`: {self.name(index)}: {error}") from error

    def _label(self, entry: Any, index: int) -> int:
        try:
            return int(self._field(entry, "target", 1))
        except (ValueError, TypeError) as error:
            raise type(error)(f"`{self.argument}`: {self.name(index)}: {error}") from error

    def _field(self, entry: Any, name: str, index: int) -> Any:
        value = entry_field(entry, name, index=index)
        if value is None:
            raise TypeError(
                f"entries must be (picture, label, ...), with a PIL image or a tensor, got "
                f"{type(entry)}."
            )
        return value

    def name(self, index: int) -> str:
        """A picture's name for messages: its file, if the data set has `samples`, or its index."""
        samples = getattr(self.data, "samples", None)
        return str(samples[index][0]) if samples else f"picture {index}"

    def warn_of_unread(self, unread: set[int]) -> None:
        """Warn that the pictures with the indices `unread` could not be read."""
        if unread:
            names = ", ".join(self.name(index) for index in sorted(unread)[:3])
            warn(
                f"{len(unread)} of {len(self)} pictures cannot be read and are left out: "
                f"{names}{', ...' if len(unread) > 3 else ''}"
            )

    def fingerprint(self) -> str:
        """A fingerprint of the data set, from its length, and the names and labels of its files.

        Without file names, some labels are used; without labels, see `pixel_fingerprint`.
        """
        if not self.has_labels:
            return self.pixel_fingerprint()
        samples = getattr(self.data, "samples", None)
        if samples:
            labels = [(Path(name).parts[-2:], int(label)) for name, label in samples]
        else:
            probes = evenly_spaced(len(self), N_PROBES)
            labels = [((str(index),), self[index].label) for index in probes]
        return f"{len(self)}, {digest(labels)}"

    def pixel_fingerprint(self) -> str:
        """A fingerprint from the names of all files, and the pixels of some at their own size."""
        samples = getattr(self.data, "samples", None) or ()
        names = [Path(sample[0]).parts[-2:] for sample in samples]
        entries = [self.read(index) for index in evenly_spaced(len(self), N_PROBES)]
        pixels = [None if entry is None else entry[1].contiguous().numpy() for entry in entries]
        digests = [None if p is None else (p.shape, digest(p.tobytes())) for p in pixels]
        return f"{len(self)} pictures, {digest((names, digests))}"


def check_data(argument: str, data: Any) -> None:
    """Raise a ValueError unless `data`, the value of `argument`, is a data set with entries."""
    if isinstance(data, DataLoader):
        raise ArgumentError(
            f"`{argument}` must be a data set, got a DataLoader: pass its `dataset`.", argument
        )
    if isinstance(data, str | Path):
        raise ArgumentError(
            f"`{argument}` must be a data set, got a path: pass torchvision's "
            f"ImageFolder({str(data)!r}) or captum_ext.datasets.ClassFolders({str(data)!r}).",
            argument,
        )
    if not isinstance(data, Sized) or len(data) == 0:
        raise ArgumentError(f"`{argument}` must have a length, and at least one picture.", argument)


def entry_field(entry: Any, *names: str, index: int | None = None) -> Any:
    """Get a field of an entry: the first of the attributes `names`, or item `index` of a tuple.

    None if there is neither.
    """
    for name in names:
        if getattr(entry, name, None) is not None:
            return getattr(entry, name)
    is_listed = isinstance(entry, tuple | list) and index is not None and index < len(entry)
    return entry[index] if is_listed else None


def evenly_spaced(n: int, count: int) -> range:
    """About `count` of `n` indices, evenly spaced."""
    return range(0, n, max(n // count, 1))


# --- boxes ---------------------------------------------------------------------------------------


def box_tensor(boxes: Any) -> Tensor:
    """Convert one box (4,) or several (n, 4) to a tensor (n, 4), float64.

    Raises:
        ValueError: another shape, or no box.
    """
    tensor = torch.as_tensor(boxes, dtype=torch.float64, device="cpu")
    tensor = tensor[None] if tensor.dim() == 1 else tensor
    if tensor.dim() != 2 or tensor.shape[1] != 4 or not len(tensor):
        raise ValueError(f"boxes must be (n, 4), n at least 1, got {tuple(tensor.shape)}.")
    return tensor


def scale_boxes(boxes: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Scale boxes of a picture with the size `before`, (H, W), to its size `after`."""
    old, new = (boxes.new_tensor([width, height] * 2) for height, width in (before, after))
    # The division comes last, so that corners at whole pixels stay exact.
    return boxes * new / old
