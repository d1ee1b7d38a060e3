"""Windows that slide over an image at several scales."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from captum_ext.imaging import resize

Size = tuple[int, int]


class Window(NamedTuple):
    """A window: its number, the index of its scale, its top left corner there, its colour class."""

    number: int
    scale: int
    y: int
    x: int
    colour: Size


def scaled_size(size: Size, short: int) -> Size:
    """`size` with its shorter side made `short`, as torchvision's `Resize` rounds it."""
    height, width = size
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def count_windows(size: Size, window: Size, step: Size) -> Size:
    """How many windows fit down and across: ceil((S - w) / t) + 1 of each."""
    down, across = (math.ceil((s - w) / t) + 1 for s, w, t in zip(size, window, step, strict=True))
    return down, across


def all_windows(sizes: Sequence[Size], window: Size, step: Size) -> list[Window]:
    """The windows at all sizes, row by row; the last of a row or column ends with the image.

    Windows of one colour class are more than a window apart, so that no pixel of a resized canvas
    mixes two of them.
    """
    (h, w), (dy, dx) = window, step
    cy, cx = 1 + math.ceil(h / dy), 1 + math.ceil(w / dx)
    counts = [count_windows(size, window, step) for size in sizes]
    places = [
        (i, min(a * dy, size[0] - h), min(b * dx, size[1] - w), (a % cy, b % cx))
        for i, (size, (down, across)) in enumerate(zip(sizes, counts, strict=True))
        for a in range(down)
        for b in range(across)
    ]
    return [Window(number, *place) for number, place in enumerate(places)]


class Cutter:
    """Cuts windows out of images at all scales: the `move` of `Following`."""

    def __init__(self, sizes: list[Size], window: Size, antialias: bool) -> None:
        self.sizes, self.window, self.antialias = sizes, window, antialias

    def __call__(
        self, tensor: Tensor, examples: Sequence[int], places: Sequence[Window], nearest: bool
    ) -> Tensor:
        cut = []
        pairs = zip(examples, places, strict=True)
        for scale, group in groupby(pairs, lambda pair: pair[1].scale):
            run = list(group)
            needed = sorted({example for example, _ in run})
            images = tensor if len(needed) == len(tensor) else tensor[needed]
            if nearest:
                images = resize(images, self.sizes[scale], "nearest-exact")
            else:
                images = resize(images, self.sizes[scale], antialias=self.antialias)
            device = tensor.device
            index = torch.tensor([needed.index(example) for example, _ in run], device=device)
            rows, columns = lines([window for _, window in run], self.window, device)
            channels = torch.arange(images.shape[1], device=device)
            cut.append(
                images[
                    index[:, None, None, None],
                    channels[:, None, None],
                    rows[:, None, :, None],
                    columns[:, None, None, :],
                ]
            )
        return torch.cat(cut)


def lines(places: Sequence[Window], window: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows (n, h) and columns (n, w) that the windows cover."""
    corners = torch.tensor([(place.y, place.x) for place in places], device=device)
    height, width = (torch.arange(side, device=device) for side in window)
    return corners[:, :1] + height, corners[:, 1:] + width
