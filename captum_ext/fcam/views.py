"""Pictures with boxes, and crops and flips that maps follow."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from captum_ext._data.pictures import PictureDataset, box_tensor, entry_field, scale_boxes
from captum_ext._data.pixels import resize_pixels


class Boxed(Dataset[tuple[Tensor, Tensor]]):
    """Pictures as bytes of one size, (3, H, W), and the boxes of their objects in it, (n, 4).

    Where a picture cannot be read there are no boxes.

    Args:
        data: what it has at i is (picture, label, boxes), or has attributes `image` and `boxes`.
            Boxes are (x1, y1, x2, y2) in the picture's own pixels, one or (n, 4).
        size: (H, W).
    """

    def __init__(self, data: Any, size: tuple[int, int]) -> None:
        self.pictures = PictureDataset(data, size, argument="validation")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        height, width = self.pictures.size
        found = self.pictures.read(index)
        if found is None:
            return torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(0, 4)
        entry, pixels = found
        name = f"`validation`: {self.pictures.name(index)}"
        given = entry_field(entry, "boxes", index=2)
        if given is None:
            raise ValueError(f"{name} has no boxes: entries must be (picture, label, boxes).")
        try:
            boxes = box_tensor(given)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        size = self.pictures.size
        boxes = scale_boxes(boxes, (pixels.shape[1], pixels.shape[2]), size)
        return resize_pixels(pixels, size), boxes.floor()


def as_batch(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Of `Boxed`: numbers of boxes differ."""
    return torch.stack([pixels for pixels, _ in items]), [boxes for _, boxes in items]


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
