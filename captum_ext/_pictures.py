"""The pictures of a data set as bytes of one size, and by what a set is known again."""

import errno
import hashlib
import struct
from collections.abc import Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from captum_ext._checks import check_count, warn

# What Pillow raises for files that are missing, cut off, damaged, too large or no pictures.
_UNREADABLE = (OSError, SyntaxError, struct.error, Image.DecompressionBombError)
OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the machine's fault, not the picture's
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
N_PROBES = 16  # entries by which a set is known again


class Item(NamedTuple):
    """What `Pictures` gives.

    Attributes:
        pixels: (3, H, W), uint8.
        label: the class.
        place: in the data.
        is_read: False where the picture could not be decoded; `pixels` are zeros then.
    """

    pixels: Tensor
    label: int
    place: int
    is_read: bool


class Pictures(Dataset[Item]):
    """Labelled pictures of any size as bytes of one size.

    Args:
        data: what it has at i is (picture, label, ...), or has attributes `image` and `target`.
            Pictures are PIL images, or tensors (3, H, W) or (1, H, W) of bytes or of floats in
            [0, 1].
        size: (H, W).
        n_classes: labels must be below it.
        argument: what errors call `data`.
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
        if isinstance(data, str | Path):
            raise ValueError(
                f"`{argument}` must be a data set, got a path: torchvision's "
                f"ImageFolder({str(data)!r}) makes one of it."
            )
        if not isinstance(data, Sized) or len(data) == 0:
            raise ValueError(f"`{argument}` must have a length, and at least one picture.")
        self.data: Any = data
        self.size, self.n_classes, self.argument = size, n_classes, argument
        self.has_labels = has_labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        found = self.read(index)
        if found is None:
            return Item(torch.zeros(3, *self.size, dtype=torch.uint8), 0, index, False)
        entry, pixels = found
        label = self._label(entry, index) if self.has_labels else 0
        if label < 0 or (self.n_classes is not None and label >= self.n_classes):
            raise ValueError(
                f"`{self.argument}`: the label of {self.name(index)} is {label}, and the "
                f"classifier has {self.n_classes} classes."
            )
        return Item(resized_to(pixels, self.size), label, index, True)

    def read(self, index: int) -> tuple[Any, Tensor] | None:
        """An entry and its pixels, (3, H, W); None, and a warning, where it cannot be read."""
        try:
            entry = self.data[index]
            alone = isinstance(entry, Tensor | Image.Image)
            return entry, as_bytes_of(entry if alone else entry_part(entry, "image", 0))
        except _UNREADABLE as error:
            if isinstance(error, OSError) and error.errno in OUT_OF:
                raise
            warn(f"{self.name(index)} cannot be read and is left out: {error}")
            return None
        except (ValueError, TypeError) as error:
            raise type(error)(f"`{self.argument}`: {self.name(index)}: {error}") from error

    def _label(self, entry: Any, index: int) -> int:
        try:
            return int(entry_part(entry, "target", 1))
        except (ValueError, TypeError) as error:
            raise type(error)(f"`{self.argument}`: {self.name(index)}: {error}") from error

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

    def about(self) -> str:
        """By what the set is known again: names and labels of files, or some labels or pictures."""
        if not self.has_labels:
            return f"{len(self)}, {self.about_pixels()}"
        samples = getattr(self.data, "samples", None)
        if samples:
            known = [(Path(name).parts[-2:], int(label)) for name, label in samples]
        else:
            known = [((str(place),), self[place].label) for place in self.probes()]
        return f"{len(self)}, {digest(known)}"

    def about_pixels(self) -> str:
        """As `about`, by the pixels of some entries."""
        return digest([self[place].pixels.numpy().tobytes() for place in self.probes()])

    def probes(self) -> range:
        """Some of the places, evenly."""
        return range(0, len(self), max(len(self) // N_PROBES, 1))


def entry_part(entry: Any, name: str, place: int) -> Any:
    """Of (picture, label, ...), or of an object with such attributes."""
    if hasattr(entry, name):
        return getattr(entry, name)
    if not isinstance(entry, tuple | list) or len(entry) <= place:
        raise TypeError(
            f"entries must be (picture, label, ...), with a PIL image or a tensor, got "
            f"{type(entry)}."
        )
    return entry[place]


def as_bytes_of(picture: Any) -> Tensor:
    """A PIL image, or a tensor of bytes or of floats in [0, 1], as bytes (3, H, W)."""
    if isinstance(picture, Tensor):
        if picture.dim() != 3 or picture.shape[0] not in (1, 3):
            raise ValueError(f"tensors must be (3, H, W) or (1, H, W), got {tuple(picture.shape)}.")
        if picture.is_floating_point():
            if not bool(((picture >= 0) & (picture <= 1)).all()):
                raise ValueError("floats must be in [0, 1]: pictures are normalised here.")
            picture = (255 * picture).round()
        elif picture.dtype != torch.uint8:
            raise ValueError(f"tensors must be of bytes or of floats, got {picture.dtype}.")
        as_bytes: Tensor = picture.to(torch.uint8).expand(3, -1, -1)
        return as_bytes
    if not isinstance(picture, Image.Image):
        raise TypeError(f"pictures must be PIL images or tensors, got {type(picture)}.")
    if picture.mode.startswith("I;16"):  # which `convert` would cut off at 255
        picture = Image.fromarray((np.array(picture) / 257).round().astype(np.uint8))
    pixels: Tensor = torch.from_numpy(np.array(picture.convert("RGB")))
    return pixels.permute(2, 0, 1)


def resized_to(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels (C, H, W) at another size, antialiased."""
    if tuple(pixels.shape[1:]) == size:
        return pixels.contiguous()
    from torchvision.transforms.v2.functional import resize

    resized: Tensor = resize(pixels, list(size), antialias=True)
    return resized


def checked_pair(name: str, value: Any) -> tuple[int, int]:
    """(H, W) of one number or two."""
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"`{name}` must be one or two numbers of pixels, got {value!r}.")
    for side in pair:
        check_count(name, side)
    return pair


def checked_channels(normalize: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of one or three channels, (C, 1, 1) each.

    Raises:
        ValueError: they are not.
    """
    try:
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in normalize)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`normalize` must be (mean, std), got {normalize!r}.") from error
    shapes = {tuple(mean.shape), tuple(std.shape)}
    if len(shapes) != 1 or shapes.isdisjoint({(1,), (3,)}) or not bool((std > 0).all()):
        raise ValueError(
            f"`normalize` must be means and standard deviations, greater than 0, of three channels "
            f"or of one, got {normalize!r}."
        )
    return mean.reshape(-1, 1, 1), std.reshape(-1, 1, 1)


def digest(values: Any) -> str:
    """Some letters that tell values apart."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def hash_of(*numbers: int) -> int:
    """A seed from several numbers, well mixed and the same on every machine."""
    return int(
        np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(2, np.uint64)[0] >> 1
    )
