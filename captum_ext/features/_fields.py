"""Which part of an image a unit sees: its receptive field, or where its gradient lies."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from captum_ext._data.pictures import PictureDataset
from captum_ext._engine.receptive_field import ReceptiveField
from captum_ext.features._layer_maps import LayerMaps


def field_boxes(field: ReceptiveField, positions: Tensor) -> Tensor:
    """The receptive fields of units, also beyond the image.

    Args:
        field: of the layer.
        positions: (..., 2), row and column of each unit.

    Returns:
        (..., 4), int64: (x1, y1, x2, y2), half-open.

    Example:
        >>> from captum_ext._engine.receptive_field import FieldAxis
        >>> axis = FieldAxis(size=5, stride=2, start=1)
        >>> field_boxes(ReceptiveField(axis, axis), torch.tensor([0, 3])).tolist()
        [5, -1, 10, 4]
    """
    lows, highs = [], []
    for axis, at in zip(field, positions.double().unbind(-1), strict=True):
        low = axis.start + axis.stride * at - (axis.size - 1) / 2
        lows.append(low.floor())
        highs.append((low + axis.size).ceil())
    return torch.stack([lows[1], lows[0], highs[1], highs[0]], -1).long()


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) without what is beyond an image of `size`; at least the nearest pixel.

    Example:
        >>> clipped(torch.tensor([[-3, 2, 4, 9], [-2, 0, 0, 1]]), (6, 5)).tolist()
        [[0, 2, 4, 6], [0, 0, 1, 1]]
    """
    ends = boxes.new_tensor([size[1], size[0]])
    low = boxes[..., :2].clamp(min=0).minimum(ends - 1)
    high = boxes[..., 2:].clamp(min=1).minimum(ends)
    return torch.cat([low, high], -1)


def energy_boxes(energy: Tensor, share: float) -> Tensor:
    """Boxes that hold at least `share` of an energy: each side cuts off (1 - share) / 4 at most.

    Args:
        energy: (B, H, W), 0 or more.
        share: in [0, 1]. With 1 the box ends where the energy does.

    Returns:
        (B, 4), int64: (x1, y1, x2, y2), half-open; the whole where there is no energy.

    Example:
        >>> energy_boxes(torch.tensor([[[0.0, 1.0, 98.0, 1.0]]]), 0.96).tolist()
        [[2, 0, 3, 1]]
    """
    tail = (1 - share) / 4
    ends = []
    for axis in (1, 2):  # what is left of the columns, of the rows
        line = energy.double().sum(axis)
        total = line.sum(1, keepdim=True)
        before = (line.cumsum(1) <= tail * total).sum(1)
        after = (line.flip(1).cumsum(1) <= tail * total).sum(1)
        none = total[:, 0] == 0
        side = line.shape[1]
        ends += [torch.where(none, 0, before), torch.where(none, side, side - after)]
    x1, x2, y1, y2 = ends
    return torch.stack([x1, y1, x2, y2], 1)


def effective_boxes(
    maps: LayerMaps,
    pictures: PictureDataset,
    channels: Sequence[int],
    places: Tensor,
    positions: Tensor,
    share: float,
    batch_size: int,
    num_workers: int,
    show_progress: bool,
) -> Tensor:
    """Where the squared gradients of activations with respect to their images lie.

    Args:
        maps: of the layer.
        pictures: of the data set.
        channels: one for each row of `places`.
        places: (U, m).
        positions: (U, m, 2).
        share: of the energy.
        batch_size: gradients at once.
        num_workers: processes that read pictures.
        show_progress: whether to draw a progress bar.

    Returns:
        (U, m, 4).

    Raises:
        ValueError: activations that do not depend on the image; a picture that can no longer be
            read.
    """
    units = torch.tensor(channels).repeat_interleave(places.shape[1]).to(maps.device)
    cells = positions.flatten(0, 1).to(maps.device)
    loader = DataLoader(
        Subset(pictures, places.flatten().tolist()),
        batch_size,
        num_workers=num_workers,
        generator=torch.Generator(),  # the global one stays as it is
    )
    found: list[Tensor] = []
    done = 0
    for pixels, _, at, is_read in tqdm(loader, desc="gradients", disable=not show_progress):
        if not bool(is_read.all()):
            raise ValueError(f"`data`: picture {int(at[~is_read][0])} cannot be read any more.")
        images = maps.images(pixels).requires_grad_()
        part = slice(done, done + len(pixels))
        done += len(pixels)
        each = torch.arange(len(pixels), device=maps.device)
        with torch.enable_grad():
            activations = maps.with_graph(images)
            chosen = activations[each, units[part], cells[part, 0], cells[part, 1]]
        if not chosen.requires_grad:
            raise ValueError(
                f"`layer` `{maps.name}` has no gradient with respect to the images, which an "
                f"effective receptive field is made of."
            )
        (gradients,) = torch.autograd.grad(chosen, images, torch.ones_like(chosen))
        energy = gradients.double().square().sum(1)  # in float32 small ones would underflow
        found.append(energy_boxes(energy, share))
    return torch.cat(found).reshape(*places.shape, 4)
