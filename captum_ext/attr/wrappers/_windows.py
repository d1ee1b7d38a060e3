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
    """A window of an image that was resized to one of several scales.

    Attributes:
        number: the position in the list of all windows.
        scale: the index of the scale.
        y: the top edge, in pixels of the resized image.
        x: the left edge, in pixels of the resized image.
        colour: windows of one colour lie apart; see `slide_windows`.
    """

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
    """The number of windows down and across: ceil((S - w) / t) + 1 of each."""
    down, across = (math.ceil((s - w) / t) + 1 for s, w, t in zip(size, window, step, strict=True))
    return down, across


def slide_windows(sizes: Sequence[Size], window: Size, step: Size) -> list[Window]:
    """The windows at all sizes, row by row. The last of a row or column ends with the image.

    Windows of one colour are more than a window apart, so that no pixel of a resized canvas mixes
    two of them.
    """
    (h, w), (dy, dx) = window, step
    cy, cx = 1 + math.ceil(h / dy), 1 + math.ceil(w / dx)
    counts = [count_windows(size, window, step) for size in sizes]
    fields = [
        (scale, min(a * dy, size[0] - h), min(b * dx, size[1] - w), (a % cy, b % cx))
        for scale, (size, (down, across)) in enumerate(zip(sizes, counts, strict=True))
        for a in range(down)
        for b in range(across)
    ]
    return [Window(number, *rest) for number, rest in enumerate(fields)]


class CropViews:
    """Crops of images at several scales: a `make_views` of `ArgumentRouter`.

    Args:
        sizes: the size of the images at each scale.
        window: the size of the crops.
        antialias: whether images are smoothed where they shrink.
    """

    def __init__(self, sizes: list[Size], window: Size, antialias: bool) -> None:
        self.sizes, self.window, self.antialias = sizes, window, antialias

    def __call__(
        self, tensor: Tensor, examples: Sequence[int], windows: Sequence[Window], nearest: bool
    ) -> Tensor:
        crops = []
        pairs = zip(examples, windows, strict=True)
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
            rows, columns = window_indices([window for _, window in run], self.window, device)
            channels = torch.arange(images.shape[1], device=device)
            crops.append(
                images[
                    index[:, None, None, None],
                    channels[:, None, None],
                    rows[:, None, :, None],
                    columns[:, None, None, :],
                ]
            )
        return torch.cat(crops)


def window_indices(
    windows: Sequence[Window], size: Size, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The rows (n, h) and columns (n, w) of pixels that windows of this size cover."""
    corners = torch.tensor([(window.y, window.x) for window in windows], device=device)
    height, width = (torch.arange(side, device=device) for side in size)
    return corners[:, :1] + height, corners[:, 1:] + width
