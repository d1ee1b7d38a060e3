"""Data sets to pictures as bytes of one size."""

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

N_PROBES = 16  # entries by which a set is known again


class PictureItem(NamedTuple):
    """What `PictureDataset` gives.

    Attributes:
        pixels: (3, H, W), uint8.
        label: the class.
        data_index: the picture's index in the data set.
        is_read: False where the picture could not be decoded; `pixels` are zeros then.
    """

    pixels: Tensor
    label: int
    data_index: int
    is_read: bool


class PictureDataset(Dataset[PictureItem]):
    """Labelled pictures of any size as bytes of one size.

    Args:
        data: its entry i is (picture, label, ...), or has attributes `image` and `target`.
            Pictures are PIL images, or tensors (3, H, W) or (1, H, W) of bytes or of floats in
            [0, 1].
        size: (H, W).
        n_classes: labels must be below it.
        argument: the name of `data` in errors.
        has_labels: whether labels are read. Entries may be pictures alone where they are not.
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
        found = self.read(index)
        if found is None:
            return PictureItem(torch.zeros(3, *self.size, dtype=torch.uint8), 0, index, False)
        entry, pixels = found
        label = self._label(entry, index) if self.has_labels else 0
        if label < 0 or (self.n_classes is not None and label >= self.n_classes):
            raise ValueError(
                f"`{self.argument}`: the label of {self.name(index)} is {label}, and the "
                f"classifier has {self.n_classes} classes."
            )
        return PictureItem(resize_pixels(pixels, self.size), label, index, True)

    def read(self, index: int) -> tuple[Any, Tensor] | None:
        """An entry and its pixels, (3, H, W); None, and a warning, where it cannot be read."""
        try:
            entry = self.data[index]
            alone = isinstance(entry, Tensor | Image.Image)
            return entry, to_byte_tensor(entry if alone else self._part(entry, "image", 0))
        except UNREADABLE as error:
            if is_resource_error(error):
                raise
            warn(f"{self.name(index)} cannot be read and is left out: {error}")
            return None
        except (ValueError, TypeError) as error:
            raise type(error)(f"`{self.argument}`: {self.name(index)}: {error}") from error

    def _label(self, entry: Any, index: int) -> int:
        try:
            return int(self._part(entry, "target", 1))
        except (ValueError, TypeError) as error:
            raise type(error)(f"`{self.argument}`: {self.name(index)}: {error}") from error

    def _part(self, entry: Any, name: str, index: int) -> Any:
        found = entry_field(entry, name, index=index)
        if found is None:
            raise TypeError(
                f"entries must be (picture, label, ...), with a PIL image or a tensor, got "
                f"{type(entry)}."
            )
        return found

    def name(self, index: int) -> str:
        """The file, where the data know it, as torchvision's folders do."""
        samples = getattr(self.data, "samples", None)
        return str(samples[index][0]) if samples else f"picture {index}"

    def warn_of(self, unread: set[int]) -> None:
        """Say which pictures could not be read, and were left out of a training."""
        if unread:
            some = ", ".join(self.name(place) for place in sorted(unread)[:3])
            warn(
                f"{len(unread)} of {len(self)} pictures cannot be read and are left out: "
                f"{some}{', ...' if len(unread) > 3 else ''}"
            )

    def fingerprint(self) -> str:
        """By what the set is known again: names and labels of files, or some labels or pictures."""
        if not self.has_labels:
            return self.pixel_fingerprint()
        samples = getattr(self.data, "samples", None)
        if samples:
            known = [(Path(name).parts[-2:], int(label)) for name, label in samples]
        else:
            known = [
                ((str(place),), self[place].label) for place in evenly_spaced(len(self), N_PROBES)
            ]
        return f"{len(self)}, {digest(known)}"

    def pixel_fingerprint(self) -> str:
        """As `fingerprint`, by the names of files and the pixels of some, at their own size."""
        samples = getattr(self.data, "samples", None) or ()
        names = [Path(sample[0]).parts[-2:] for sample in samples]
        found = [self.read(place) for place in evenly_spaced(len(self), N_PROBES)]
        pixels = [None if f is None else f[1].contiguous().numpy() for f in found]
        parts = [None if p is None else (p.shape, digest(p.tobytes())) for p in pixels]
        return f"{len(self)} pictures, {digest((names, parts))}"


def check_data(argument: str, data: Any) -> None:
    """Raise a ValueError unless `data` is a data set that is not empty."""
    if isinstance(data, DataLoader):
        raise ArgumentError(
            f"`{argument}` must be a data set, got a DataLoader: give its `dataset`.", argument
        )
    if isinstance(data, str | Path):
        raise ArgumentError(
            f"`{argument}` must be a data set, got a path: torchvision's "
            f"ImageFolder({str(data)!r}) or captum_ext.datasets.ClassFolders makes one of it.",
            argument,
        )
    if not isinstance(data, Sized) or len(data) == 0:
        raise ArgumentError(f"`{argument}` must have a length, and at least one picture.", argument)


def entry_field(entry: Any, *names: str, index: int | None = None) -> Any:
    """The first of these attributes that is there, or that entry of a tuple; None without."""
    for name in names:
        if getattr(entry, name, None) is not None:
            return getattr(entry, name)
    is_listed = isinstance(entry, tuple | list) and index is not None and index < len(entry)
    return entry[index] if is_listed else None


def evenly_spaced(n: int, count: int) -> range:
    """About that many of n indices, evenly spaced."""
    return range(0, n, max(n // count, 1))


# --- boxes ---------------------------------------------------------------------------------------


def box_tensor(boxes: Any) -> Tensor:
    """One box or several as (n, 4), float64.

    Raises:
        ValueError: another shape, or none.
    """
    found = torch.as_tensor(boxes, dtype=torch.float64)
    found = found[None] if found.dim() == 1 else found
    if found.dim() != 2 or found.shape[1] != 4 or not len(found):
        raise ValueError(f"boxes must be (n, 4), n at least 1, got {tuple(found.shape)}.")
    return found


def scale_boxes(boxes: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Boxes of a picture of one (H, W) in the picture at another."""
    old, new = (boxes.new_tensor([width, height] * 2) for height, width in (before, after))
    # Divided last: a corner that comes to a whole pixel is not a little less, or more.
    return boxes * new / old
