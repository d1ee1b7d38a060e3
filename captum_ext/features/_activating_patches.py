"""The patches that activate units most: where they are, their pictures, and a figure of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_ext._data.pictures import PictureDataset
from captum_ext._engine.receptive_field import ReceptiveField
from captum_ext._identity import describe_changes
from captum_ext.features._fields import field_boxes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class ActivatingPatches:
    """The patches that `maximally_activating_patches` found of U units, m of each, on the CPU.

    Attributes:
        layer: its name.
        units: the channels, one for each row of what follows.
        values: (U, m), the activations, the largest first, in float32 or float64.
        places: (U, m), int64: where the pictures are in the data set.
        positions: (U, m, 2), int64: row and column in the layer's map.
        boxes: (U, m, 4), int64: (x1, y1, x2, y2) in pixels of the image as the model saw it,
            half-open, without what lies in the padding; at least one pixel.
        size: (H, W) of the images.
        n: how many were asked for of each unit.
        field: the receptive field along rows and columns: size, stride, and centre of the first
            unit, in pixels. None where the boxes are the whole image.
        reason: why they are that although it was not asked for, or None.
        unread: the names of the pictures that could not be read.
    """

    layer: str
    units: tuple[int, ...]
    values: Tensor
    places: Tensor
    positions: Tensor
    boxes: Tensor
    size: tuple[int, int]
    n: int
    field: ReceptiveField | None
    reason: str | None
    unread: tuple[str, ...]

    def row(self, unit: int) -> int:
        """Where the unit is in `units`.

        Raises:
            ValueError: it is not.
        """
        if unit not in self.units:
            raise ValueError(f"`unit` must be one of {_few(self.units)}, got {unit!r}.")
        return self.units.index(unit)

    @property
    def unclipped_boxes(self) -> Tensor:
        """(U, m, 4): the whole receptive fields, with what lies in the padding."""
        if self.field is None:
            return self.boxes
        return field_boxes(self.field, self.positions)

    def merge(self, *others: "ActivatingPatches") -> "ActivatingPatches":
        """The best of what several processes found in other pictures of the same data set.

        Raises:
            ValueError: another layer, other units, sizes or numbers; pictures in common.
        """
        parts = (self, *others)
        for other in others:
            changed = describe_changes(self._fingerprint(), other._fingerprint())
            if changed:
                raise ValueError(f"`others` are of another run: {changed}.")
        places = [set(part.places.flatten().tolist()) for part in parts]
        if len(set.union(*places)) < sum(map(len, places)):
            raise ValueError("`others` have pictures in common with this one, or each other.")
        values, at, positions, boxes = (
            torch.cat([getattr(part, name) for part in parts], 1)
            for name in ("values", "places", "positions", "boxes")
        )
        order = torch.arange(at.shape[1]).expand(at.shape)
        for key in (positions[..., 1], positions[..., 0], at, -values):  # the last decides
            order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
        order = order[:, : self.n]
        rows = torch.arange(len(at))[:, None]
        return replace(
            self,
            values=values[rows, order],
            places=at[rows, order],
            positions=positions[rows, order],
            boxes=boxes[rows, order],
            unread=sum((part.unread for part in parts), ()),
        )

    def _fingerprint(self) -> dict[str, Any]:
        names = ("layer", "units", "size", "n", "field", "reason")
        return {name: getattr(self, name) for name in names}

    def picture_boxes(self, data: Any, unit: int) -> Tensor:
        """A unit's boxes in each picture's own pixels, (m, 4), before they were resized.

        Corners are rounded outwards to whole pixels. The few pixels more that antialiasing mixes in
        are left aside.

        Args:
            data: the data set that the patches were found in.
            unit: one of `units`.

        Raises:
            ValueError: an unknown unit, or a picture that can no longer be read.
        """
        return torch.stack([box for _, box in self._pictures(data, unit)])

    def crops(self, data: Any, unit: int) -> list[Tensor]:
        """A unit's patches, cut out of the pictures at their own resolution: uint8, (3, h, w).

        Args:
            data: the data set that the patches were found in.
            unit: one of `units`.

        Raises:
            ValueError: as in `picture_boxes`.
        """
        pairs = ((pixels, box.tolist()) for pixels, box in self._pictures(data, unit))
        # Copies: the pixels may be the data set's own.
        return [pixels[:, y1:y2, x1:x2].clone() for pixels, (x1, y1, x2, y2) in pairs]

    def figure(
        self, data: Any, units: Sequence[int] | None = None, *, context: bool = False
    ) -> "Figure":
        """A matplotlib figure: a row for each unit, with the activation above each patch.

        Args:
            data: the data set that the patches were found in.
            units: which of `units`; None is the first ten.
            context: whether to draw the whole pictures, with the boxes in them.

        Raises:
            ValueError: as in `picture_boxes`.
        """
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        shown = list(self.units[:10] if units is None else units)
        rows, columns = [self.row(unit) for unit in shown], self.values.shape[1]
        picture = Figure(
            figsize=(0.3 + 1.1 * columns, 0.1 + 1.3 * len(rows)),
            dpi=150,
            facecolor="white",
            layout="constrained",
        )
        axes = picture.subplots(len(rows), columns, squeeze=False)
        for unit, row, line in zip(shown, rows, axes, strict=True):
            pairs = self._pictures(data, unit)
            for axis, (pixels, box), value in zip(line, pairs, self.values[row], strict=True):
                x1, y1, x2, y2 = box.tolist()
                seen = pixels if context else pixels[:, y1:y2, x1:x2]
                axis.imshow(seen.permute(1, 2, 0).numpy())
                if context:
                    # Pixel 0 goes from -1/2 to 1/2.
                    at, wide, high = (x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1
                    axis.add_patch(Rectangle(at, wide, high, fill=False, color="red", lw=1.5))
                axis.set_title(f"{value:.3g}", fontsize=7, pad=2)
                axis.set_xticks([])
                axis.set_yticks([])
            line[0].set_ylabel(f"unit {unit}", fontsize=8)
        return picture

    def _pictures(self, data: Any, unit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A unit's pictures at their own size, (3, h, w), and its box in each."""
        row = self.row(unit)
        pictures, (height, width) = PictureDataset(data, self.size), self.size
        for place, box in zip(self.places[row].tolist(), self.boxes[row], strict=True):
            found = pictures.read(place) if place < len(pictures) else None
            if found is None:
                raise ValueError(f"`data`: picture {place} cannot be read any more.")
            pixels = found[1]
            new = torch.tensor([pixels.shape[2], pixels.shape[1]])
            old = torch.tensor([width, height])
            low, high = box[:2] * new // old, -(-box[2:] * new // old)
            yield pixels, torch.cat([low, high])


def _few(values: Sequence[Any]) -> str:
    """The first ten, in words."""
    return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
