"""The pictures of a training set, and crops and flips that maps follow."""

import errno
import hashlib
import struct
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import Dataset, Sampler

from captum_ext._checks import warn

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
    """

    def __init__(
        self,
        data: Any,
        size: tuple[int, int],
        n_classes: int | None = None,
        argument: str = "data",
    ) -> None:
        if not isinstance(data, Sized) or len(data) == 0:
            raise ValueError(f"`{argument}` must have a length, and at least one picture.")
        self.data: Any = data
        self.size, self.n_classes, self.argument = size, n_classes, argument

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        found = self.read(index)
        if found is None:
            return Item(torch.zeros(3, *self.size, dtype=torch.uint8), 0, index, False)
        entry, pixels = found
        label = int(entry_part(entry, "target", 1))
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
            return entry, as_bytes_of(entry_part(entry, "image", 0))
        except _UNREADABLE as error:
            if isinstance(error, OSError) and error.errno in OUT_OF:
                raise
            warn(f"{self.name(index)} cannot be read and is left out: {error}")
            return None
        except (ValueError, TypeError) as error:
            raise type(error)(f"`{self.argument}`: {self.name(index)}: {error}") from error

    def name(self, index: int) -> str:
        """The file, where the data know it, as torchvision's folders do."""
        samples = getattr(self.data, "samples", None)
        return str(samples[index][0]) if samples else f"picture {index}"

    def about(self) -> str:
        """By what the set is known again: names and labels of files, or labels of some entries."""
        samples = getattr(self.data, "samples", None)
        if samples:
            known = [(Path(name).parts[-2:], int(label)) for name, label in samples]
        else:
            known = [((str(place),), self[place].label) for place in self.probes()]
        return f"{len(self)}, {digest(known)}"

    def probes(self) -> range:
        """Some of the places, evenly."""
        return range(0, len(self), max(len(self) // N_PROBES, 1))


class Boxed(Dataset[tuple[Tensor, Tensor]]):
    """Pictures as bytes of one size, (3, H, W), and the boxes of their objects in it, (n, 4).

    Where a picture cannot be read there are no boxes.

    Args:
        data: what it has at i is (picture, label, boxes), or has attributes `image` and `boxes`.
            Boxes are (x1, y1, x2, y2) in the picture's own pixels, one or (n, 4).
        size: (H, W).
    """

    def __init__(self, data: Any, size: tuple[int, int]) -> None:
        self.pictures = Pictures(data, size, argument="validation")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        height, width = self.pictures.size
        found = self.pictures.read(index)
        if found is None:
            return torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(0, 4)
        entry, pixels = found
        name = f"`validation`: {self.pictures.name(index)}"
        has_none = len(entry) < 3 if isinstance(entry, tuple | list) else False
        given = None if has_none else entry_part(entry, "boxes", 2)
        if given is None:
            raise ValueError(f"{name} has no boxes: entries must be (picture, label, boxes).")
        boxes = torch.as_tensor(given, dtype=torch.float64)
        boxes = boxes[None] if boxes.dim() == 1 else boxes
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not len(boxes):
            raise ValueError(
                f"{name} has boxes {tuple(boxes.shape)}: they must be (n, 4), n at least 1."
            )
        old = boxes.new_tensor([pixels.shape[2], pixels.shape[1]] * 2)
        # Divided last: a corner that comes to a whole pixel is not a little less.
        boxes = boxes * boxes.new_tensor([width, height] * 2) / old
        return resized_to(pixels, self.pictures.size), boxes.floor()


def as_batch(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Of `Boxed`: numbers of boxes differ."""
    return torch.stack([pixels for pixels, _ in items]), [boxes for _, boxes in items]


def entry_part(entry: Any, name: str, place: int) -> Any:
    """Of (picture, label, ...), or of an object with such attributes."""
    if hasattr(entry, name):
        return getattr(entry, name)
    if not isinstance(entry, tuple | list) or len(entry) <= place:
        raise TypeError(f"entries must be (picture, label, ...), got {type(entry)}.")
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


class View(NamedTuple):
    """A crop of each picture of a batch, mirrored or not: its rows and columns, (N, H), (N, W)."""

    rows: Tensor
    columns: Tensor

    def of(self, pictures: Tensor) -> Tensor:
        """The same of pictures and maps, (N, C, H, W) of the pictures' size."""
        n = torch.arange(len(pictures), device=pictures.device)[:, None, None, None]
        channels = torch.arange(pictures.shape[1], device=pictures.device)[:, None, None]
        return pictures[n, channels, self.rows[:, None, :, None], self.columns[:, None, None]]


def random_view(
    n: int,
    whole: Sequence[int],
    size: tuple[int, int],
    flip: bool,
    generator: Generator,
) -> View:
    """A random crop of `size` out of `whole`, each picture's own, mirrored every other time."""
    lines = []
    for side, part in zip(whole, size, strict=True):
        first = torch.randint(side - part + 1, (n, 1), generator=generator, device=generator.device)
        lines.append(first + torch.arange(part, device=generator.device))
    coins = torch.rand((n, 1), generator=generator, device=generator.device) < 0.5
    if flip:
        lines[1] = torch.where(coins, lines[1].flip(1), lines[1])
    return View(*lines)


class Shuffled(Sampler[int]):
    """A new order in each epoch, that depends on the seed and the epoch alone."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def __len__(self) -> int:
        return self.n

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = Generator().manual_seed(hash_of(self.seed, self.epoch))
        return iter(torch.randperm(self.n, generator=generator).tolist())


def digest(values: Any) -> str:
    """Some letters that tell values apart."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def hash_of(*numbers: int) -> int:
    """A seed from several numbers, well mixed and the same on every machine."""
    return int(
        np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(2, np.uint64)[0] >> 1
    )
