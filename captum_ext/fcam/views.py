"""Validation pictures with boxes; random crops and flips of pictures and their maps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from captum_ext._data.pictures import PictureDataset, box_tensor, entry_field, scale_boxes
from captum_ext._data.pixels import resize_pixels
from captum_ext._errors import ArgumentError


class BoxedPictures(Dataset[tuple[Tensor, Tensor]]):
    """Pictures (3, H, W) as bytes of one size, and the boxes (n, 4) of their objects.

    A picture that cannot be read is black and has no boxes.

    Args:
        data: entry i is (picture, label, boxes), or has the attributes `image` and `boxes`. Boxes
            are (x1, y1, x2, y2) in the picture's own pixels, (4,) or (n, 4).
        size: (H, W) that pictures are resized to, with their boxes.

    Raises:
        ValueError: `data` is no data set, or is empty. Reading an entry without valid boxes raises
            one, too.
    """

    def __init__(self, data: Any, size: tuple[int, int]) -> None:
        self.pictures = PictureDataset(data, size, argument="validation")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        height, width = self.pictures.size
        entry_and_pixels = self.pictures.read(index)
        if entry_and_pixels is None:
            blank = torch.zeros(3, height, width, dtype=torch.uint8, device="cpu")
            return blank, torch.zeros(0, 4, dtype=torch.float32, device="cpu")
        entry, pixels = entry_and_pixels
        name = f"`validation`: {self.pictures.name(index)}"
        boxes = entry_field(entry, "boxes", index=2)
        if boxes is None:
            raise ArgumentError(
                f"{name} has no boxes: entries must be (picture, label, boxes).", "validation"
            )
        try:
            boxes = box_tensor(boxes)
        except ValueError as error:
            raise ArgumentError(f"{name}: {error}", "validation") from error
        size = self.pictures.size
        boxes = scale_boxes(boxes, (pixels.shape[1], pixels.shape[2]), size)
        return resize_pixels(pixels, size), boxes.floor()


def collate_boxed(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """A batch of `BoxedPictures`; the boxes stay a list, because their numbers differ."""
    return torch.stack([pixels for pixels, _ in items]), [boxes for _, boxes in items]


class Crops(NamedTuple):
    """A crop of each picture of a batch, which may be mirrored.

    Attributes:
        rows: (N, h), int64: the rows of each crop.
        columns: (N, w), int64: its columns, in decreasing order in a mirrored crop.
    """

    rows: Tensor
    columns: Tensor

    def crop(self, pictures: Tensor) -> Tensor:
        """The crops (N, C, h, w) of pictures, or of maps of their size, (N, C, H, W)."""
        n = torch.arange(len(pictures), device=pictures.device)[:, None, None, None]
        channels = torch.arange(pictures.shape[1], device=pictures.device)[:, None, None]
        return pictures[n, channels, self.rows[:, None, :, None], self.columns[:, None, None]]


def draw_crops(
    n: int,
    picture_size: tuple[int, int],
    crop_size: tuple[int, int],
    flip: bool,
    generator: Generator,
) -> Crops:
    """Random crops of n pictures, mirrored with probability 1/2 if `flip`."""
    lines = []
    for side, part in zip(picture_size, crop_size, strict=True):
        first = torch.randint(side - part + 1, (n, 1), generator=generator, device=generator.device)
        lines.append(first + torch.arange(part, device=generator.device))
    options: Any = {"generator": generator, "dtype": torch.float32, "device": generator.device}
    is_mirrored = torch.rand((n, 1), **options) < 0.5
    if flip:
        lines[1] = torch.where(is_mirrored, lines[1].flip(1), lines[1])
    return Crops(*lines)
