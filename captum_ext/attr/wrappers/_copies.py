"""Moved copies of images, and what becomes of their maps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_ext.attr.wrappers.super_resolution import Observation, solve
from captum_ext.imaging import lay_over, resize, warp

Fill = str | float | Tensor

_SOLVED_AT_ONCE = 2**19  # pixels


class Mover:
    """Moves images as their copies are: the `move` of `Following`.

    Args:
        steps: matrices (L, 3, 3), one for each interpolation.
        fill: as in `imaging.warp`; a colour is for images and baselines only.
        channels: of the images.
    """

    def __init__(self, steps: Sequence[Tensor], fill: Fill, channels: int) -> None:
        self.steps, self.fill, self.channels = steps, fill, channels

    def __call__(
        self, tensor: Tensor, examples: Sequence[int], places: Sequence[int], nearest: bool
    ) -> Tensor:
        is_colour = not isinstance(self.fill, str)
        fill = "zeros" if is_colour and (nearest or tensor.shape[1] != self.channels) else self.fill
        moved = tensor[torch.tensor(examples, device=tensor.device)]
        for step in self.steps:
            moved = warp(moved, step[list(places)], "nearest" if nearest else "bilinear", fill)
        return moved


class Average:
    """Mean or maximum of the upsampled maps, moved back, over the copies that show the pixel."""

    def __init__(
        self, images: Tensor, steps: Sequence[Tensor], offset: tuple[float, float], is_max: bool
    ) -> None:
        matrices = steps[0]
        for step in steps[1:]:
            matrices = step @ matrices
        self.back, self.offset, self.is_max = torch.linalg.inv(matrices), offset, is_max
        self.images, self.total = images, torch.zeros(())

    def add(self, maps: Tensor, examples: Sequence[int], places: Sequence[int]) -> None:
        size = (self.images.shape[2], self.images.shape[3])
        up = lay_over(maps, size, self.offset)
        moved = warp(torch.cat([up, torch.ones_like(up)], 1), self.back[list(places)])
        if not self.total.dim():
            shape = (len(self.images), moved.shape[1], *size)
            self.total = moved.new_full(shape, -torch.inf if self.is_max else 0.0)
        index = torch.tensor(examples, device=maps.device)
        if self.is_max:
            values, shown = moved.split(1, 1)
            moved = torch.where(shown > 0.99, values / shown, -torch.inf).expand_as(moved)
            index = index[:, None, None, None].expand_as(moved)
            self.total.scatter_reduce_(0, index, moved, "amax")
        else:
            self.total.index_add_(0, index, moved)

    def result(self) -> tuple[Tensor, None]:
        values, shown = self.total.split(1, 1)
        return (values if self.is_max else values / shown), None


class Solved:
    """The maps of all copies, solved for one fine map of each image.

    Args:
        images: (B, C, H, W).
        observe: K.
        normalize: "global", "per_map" or "none".
        options: for `solve`.
    """

    def __init__(
        self, images: Tensor, observe: Observation, normalize: str, options: dict[str, Any]
    ) -> None:
        self.images, self.observe, self.normalize = images, observe, normalize
        self.options = options
        self.maps = observe.kept.new_zeros(observe.copies, len(images), *observe.cells)

    def add(self, maps: Tensor, examples: Sequence[int], places: Sequence[int]) -> None:
        self.maps[list(places), list(examples)] = maps[:, 0]

    def result(self) -> tuple[Tensor, Tensor]:
        """The maps (B, 1, H, W), and the objective (B, n) before and after every iteration."""
        scale = torch.ones_like(self.maps[:1, :, :1, :1])
        if self.normalize != "none":
            dims = (0, 2, 3) if self.normalize == "global" else (2, 3)
            scale = self.maps.abs().amax(dims, keepdim=True)
            scale = torch.where(scale == 0, 1, scale)
        height, width = self.observe.size
        at_once = max(1, _SOLVED_AT_ONCE // (height * width))
        solutions = [
            solve(self.observe, part, **self.options)
            for part in (self.maps / scale).split(at_once, 1)
        ]
        h = torch.cat([solution.h for solution in solutions])[:, None]
        if self.normalize == "global":
            h = h * scale.reshape(-1, 1, 1, 1)
        longest = max(solution.history.shape[1] for solution in solutions)
        history = torch.cat([_lengthened(solution.history, longest) for solution in solutions])
        return resize(h, self.images.shape[2:]), history


def _lengthened(history: Tensor, length: int) -> Tensor:
    return torch.cat([history, history[:, -1:].expand(-1, length - history.shape[1])], 1)
