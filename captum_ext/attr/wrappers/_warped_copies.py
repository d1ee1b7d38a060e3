"""Warped copies of images, and the merging of their maps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_ext.attr.wrappers.super_resolution import Observation, solve
from captum_ext.imaging import lay_over, resize, warp

Fill = str | float | Tensor

_PIXELS_AT_ONCE = 2**19  # of the images whose maps are solved together


class WarpViews:
    """Warped copies of images: a `make_views` of `ArgumentRouter`.

    Args:
        steps: matrices (L, 3, 3) of the L copies, once for each interpolation.
        fill: as in `imaging.warp`. A colour fills only tensors with as many channels as the images.
        channels: of the images.
    """

    def __init__(self, steps: Sequence[Tensor], fill: Fill, channels: int) -> None:
        self.steps, self.fill, self.channels = steps, fill, channels

    def __call__(
        self, tensor: Tensor, examples: Sequence[int], copies: Sequence[int], nearest: bool
    ) -> Tensor:
        is_colour = not isinstance(self.fill, str)
        fill = "zeros" if is_colour and (nearest or tensor.shape[1] != self.channels) else self.fill
        warped = tensor[torch.tensor(examples, device=tensor.device)]
        for step in self.steps:
            warped = warp(warped, step[list(copies)], "nearest" if nearest else "bilinear", fill)
        return warped


class MeanOverCopies:
    """The mean (or maximum) of the maps of warped copies, upsampled and warped back.

    Each pixel counts only the copies in which it is visible.

    Args:
        images: (B, C, H, W).
        steps: the matrices of `WarpViews`.
        offset: of the maps' units, as in `imaging.lay_over`.
        is_max: whether the maximum is taken instead of the mean.
    """

    def __init__(
        self, images: Tensor, steps: Sequence[Tensor], offset: tuple[float, float], is_max: bool
    ) -> None:
        matrices = steps[0]
        for step in steps[1:]:
            matrices = step @ matrices
        self.inverse, self.offset, self.is_max = torch.linalg.inv(matrices), offset, is_max
        self.images, self.total = images, images.new_zeros(())

    def add(self, maps: Tensor, examples: Sequence[int], copies: Sequence[int]) -> None:
        size = (self.images.shape[2], self.images.shape[3])
        upsampled = lay_over(maps, size, self.offset)
        pair = torch.cat([upsampled, torch.ones_like(upsampled)], 1)
        warped = warp(pair, self.inverse[list(copies)])
        if not self.total.dim():
            shape = (len(self.images), warped.shape[1], *size)
            self.total = warped.new_full(shape, -torch.inf if self.is_max else 0.0)
        index = torch.tensor(examples, device=maps.device)
        if self.is_max:
            values, visible = warped.split(1, 1)
            warped = torch.where(visible > 0.99, values / visible, -torch.inf).expand_as(warped)
            index = index[:, None, None, None].expand_as(warped)
            self.total.scatter_reduce_(0, index, warped, "amax")
        else:
            self.total.index_add_(0, index, warped)

    def result(self) -> tuple[Tensor, None]:
        """The maps (B, 1, H, W), and None in place of an objective."""
        values, visible = self.total.split(1, 1)
        return (values if self.is_max else values / visible), None


class SuperResolution:
    """The fine map of each image that explains the maps of all its warped copies.

    Args:
        images: (B, C, H, W).
        observe: K, the operator from a fine map to the maps of its copies.
        normalize: "global", "per_map" or "none".
        options: for `solve`.
    """

    def __init__(
        self, images: Tensor, observe: Observation, normalize: str, options: dict[str, Any]
    ) -> None:
        self.images, self.observe, self.normalize = images, observe, normalize
        self.options = options
        self.maps = observe.kept.new_zeros(observe.copies, len(images), *observe.cells)

    def add(self, maps: Tensor, examples: Sequence[int], copies: Sequence[int]) -> None:
        self.maps[list(copies), list(examples)] = maps[:, 0]

    def result(self) -> tuple[Tensor, Tensor]:
        """The maps (B, 1, H, W), and the objective (B, n) before and after every iteration."""
        scale = torch.ones_like(self.maps[:1, :, :1, :1])
        if self.normalize != "none":
            dims = (0, 2, 3) if self.normalize == "global" else (2, 3)
            scale = self.maps.abs().amax(dims, keepdim=True)
            scale = torch.where(scale == 0, 1, scale)
        height, width = self.observe.size
        images_at_once = max(1, _PIXELS_AT_ONCE // (height * width))
        solutions = [
            solve(self.observe, maps, **self.options)
            for maps in (self.maps / scale).split(images_at_once, 1)
        ]
        h = torch.cat([solution.h for solution in solutions])[:, None]
        if self.normalize == "global":
            h = h * scale.reshape(-1, 1, 1, 1)
        longest = max(solution.history.shape[1] for solution in solutions)
        history = torch.cat([_extend(solution.history, longest) for solution in solutions])
        return resize(h, self.images.shape[2:]), history


def _extend(history: Tensor, length: int) -> Tensor:
    """Repeat the last objective of each image up to `length` iterations."""
    return torch.cat([history, history[:, -1:].expand(-1, length - history.shape[1])], 1)
