"""Checks of maps, masks and boxes, which bring them to one form or raise an error."""

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_ext._checks import check_dense
from captum_ext.imaging import one_channel


def checked_maps(maps: Tensor, name: str = "attributions") -> Tensor:
    """One finite map for each image, (B, H, W), in float32 or better."""
    if not isinstance(maps, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(maps)}.")
    check_dense(name, maps)
    if maps.dim() not in (3, 4) or 0 in maps.shape[1:]:
        raise ValueError(f"`{name}` must be (B, C, H, W) or (B, H, W), got {tuple(maps.shape)}.")
    values = maps.detach()
    values = one_channel(values if values.dim() == 4 else values[:, None])[:, 0]
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"`{name}` has values that are not finite.")
    return values


def checked_unit_maps(maps: Tensor) -> Tensor:
    """Maps (B, H, W) in [0, 1], checked as by `checked_maps`."""
    values = checked_maps(maps, "maps")
    if bool((values < 0).any() | (values > 1).any()):
        raise ValueError("`maps` must be in [0, 1]: scale them by `imaging.min_max`.")
    return values


def checked_masks(masks: Tensor, name: str = "masks") -> Tensor:
    """Masks (B, H, W), bool."""
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        got = masks.dtype if isinstance(masks, Tensor) else type(masks)
        raise TypeError(f"`{name}` must be bool, got {got}.")
    if masks.dim() == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks.dim() != 3 or 0 in masks.shape[1:]:
        raise ValueError(f"`{name}` must be (B, H, W) or (B, 1, H, W), got {tuple(masks.shape)}.")
    return masks


def check_boxes(boxes: Sequence[Tensor], n: int, name: str = "boxes") -> None:
    """Raise a ValueError unless each of n images has one box or more, (m, 4)."""
    if len(boxes) != n or any(b.dim() != 2 or b.shape[1] != 4 or not len(b) for b in boxes):
        shapes = [tuple(b.shape) for b in boxes]
        raise ValueError(
            f"`{name}` must be a tensor (n, 4), n at least 1, for each of {n} images, got {shapes}."
        )


def check_corners(boxes: Tensor, name: str = "boxes") -> None:
    """Raise a ValueError unless boxes (n, 4) are finite, with x1 <= x2 and y1 <= y2."""
    if not bool((boxes[:, 2:] >= boxes[:, :2]).all() & torch.isfinite(boxes).all()):
        raise ValueError(f"`{name}` must be finite and have x1 <= x2 and y1 <= y2.")
