"""Boxes of the image regions that units see, by receptive fields or by gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from captum_ext._data.loading import CpuLoader
from captum_ext._data.pictures import PictureDataset
from captum_ext._engine.receptive_field import ReceptiveField
from captum_ext._errors import ArgumentError
from captum_ext._layer_maps import LayerMaps


def field_boxes(field: ReceptiveField, positions: Tensor) -> Tensor:
    """The receptive fields of units, which may extend beyond the image.

    Args:
        field: the layer's receptive field.
        positions: (..., 2), row and column of each unit in the layer's map.

    Returns:
        Boxes (..., 4), int64: (x1, y1, x2, y2) in pixels, half-open.

    Example:
        >>> from captum_ext._engine.receptive_field import FieldAxis
        >>> axis = FieldAxis(size=5, stride=2, start=1)
        >>> field_boxes(ReceptiveField(axis, axis), torch.tensor([0, 3])).tolist()
        [5, -1, 10, 4]
    """
    lows, highs = [], []
    by_axis = positions.flip(-1) if field.is_transposed else positions
    for axis, position in zip(field[:2], by_axis.double().unbind(-1), strict=True):
        low = axis.start + axis.stride * position - (axis.size - 1) / 2
        lows.append(low.floor())
        highs.append((low + axis.size).ceil())
    return torch.stack([lows[1], lows[0], highs[1], highs[0]], -1).long()


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) clipped to an image of `size`, (H, W); at least the nearest pixel is left.

    Example:
        >>> clip_boxes(torch.tensor([[-3, 2, 4, 9], [-2, 0, 0, 1]]), (6, 5)).tolist()
        [[0, 2, 4, 6], [0, 0, 1, 1]]
    """
    ends = boxes.new_tensor([size[1], size[0]])
    low = boxes[..., :2].clamp(min=0).minimum(ends - 1)
    high = boxes[..., 2:].clamp(min=1).minimum(ends)
    return torch.cat([low, high], -1)


def energy_boxes(energy: Tensor, share: float) -> Tensor:
    """Boxes with at least `share` of the energy. Each side cuts off at most (1 - share) / 4 of it.

    Args:
        energy: (B, H, W), 0 or more.
        share: in [0, 1]. With 1 the box contains all energy.

    Returns:
        Boxes (B, 4), int64: (x1, y1, x2, y2), half-open; the whole image without energy.

    Example:
        >>> energy_boxes(torch.tensor([[[0.0, 1.0, 98.0, 1.0]]]), 0.96).tolist()
        [[2, 0, 3, 1]]
    """
    tail = (1 - share) / 4
    ends = []
    for axis in (1, 2):  # sums over rows, then over columns
        line = energy.double().sum(axis)
        total = line.sum(1, keepdim=True)
        before = (line.cumsum(1) <= tail * total).sum(1)
        after = (line.flip(1).cumsum(1) <= tail * total).sum(1)
        is_empty = total[:, 0] == 0
        side = line.shape[1]
        ends += [torch.where(is_empty, 0, before), torch.where(is_empty, side, side - after)]
    x1, x2, y1, y2 = ends
    return torch.stack([x1, y1, x2, y2], 1)


def effective_boxes(
    maps: LayerMaps,
    pictures: PictureDataset,
    channels: Sequence[int],
    indices: Tensor,
    positions: Tensor,
    share: float,
    batch_size: int,
    num_workers: int,
    show_progress: bool,
) -> Tensor:
    """Effective receptive fields: boxes around the squared gradients of units in their images.

    Args:
        maps: the layer's maps.
        pictures: the data set.
        channels: the channel of each row of `indices`.
        indices: (U, m), of the pictures.
        positions: (U, m, 2), row and column of the units in the layer's map.
        share: the share of squared gradients in each box.
        batch_size: gradients computed at once.
        num_workers: processes that read pictures.
        show_progress: whether to draw a progress bar.

    Returns:
        Boxes (U, m, 4), int64: (x1, y1, x2, y2), half-open.

    Raises:
        ValueError: the activations do not depend on the images, or a picture can no longer be read.
    """
    device = maps.device
    units = torch.tensor(channels, device=device).repeat_interleave(indices.shape[1])
    rows, columns = positions.flatten(0, 1).to(device).unbind(1)
    loader = CpuLoader(
        Subset(pictures, indices.flatten().tolist()),
        batch_size,
        num_workers=num_workers,
        generator=torch.Generator(),  # the global one stays as it is
    )
    boxes: list[Tensor] = []
    n_done = 0
    for pixels, _, batch, is_read in tqdm(loader, desc="gradients", disable=not show_progress):
        if not bool(is_read.all()):
            raise ArgumentError(
                f"`data`: picture {int(batch[~is_read][0])} cannot be read any more.", "data"
            )
        images = maps.images(pixels.to(device).float() / 255).requires_grad_()
        part = slice(n_done, n_done + len(pixels))
        n_done += len(pixels)
        with torch.enable_grad():
            examples = torch.arange(len(pixels), device=device)
            activations = maps(images)[examples, units[part], rows[part], columns[part]]
        if not activations.requires_grad:
            raise ArgumentError(
                f"`layer` `{maps.name}` has no gradient with respect to the images, which an "
                f"effective receptive field needs.",
                "layer",
            )
        (gradients,) = torch.autograd.grad(activations, images, torch.ones_like(activations))
        energy = gradients.double().square().sum(1)  # in float32 small gradients would underflow
        boxes.append(energy_boxes(energy, share))
    return torch.cat(boxes).reshape(*indices.shape, 4)
