"""The result of `maximally_activating_patches`: positions, boxes, crops and a figure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_ext._data.pictures import PictureDataset
from captum_ext._deprecation import warn_renamed
from captum_ext._engine.receptive_field import ReceptiveField
from captum_ext._errors import ArgumentError
from captum_ext._identity import describe_changes
from captum_ext.features._fields import field_boxes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class ActivatingPatches:
    """The m patches that activate each of U units most, in tensors on the CPU.

    Attributes:
        layer: the name of the layer.
        units: the channels of the U rows of the tensors.
        values: (U, m), the activations, the largest first, in float32 or float64.
        indices: (U, m), int64: the pictures' indices in the data set.
        positions: (U, m, 2), int64: row and column in the layer's map.
        boxes: (U, m, 4), int64: (x1, y1, x2, y2), half-open, in pixels of the image at the model's
            input, clipped to the image; at least one pixel.
        size: (H, W) of the images.
        n: the requested number of patches of each unit.
        field: the receptive field along rows and columns: size, stride, and centre of the first
            unit, in pixels. None if the boxes are the whole image.
        reason: why the boxes are the whole image although a receptive field was requested, or None.
        unread: the names of the pictures that could not be read.
    """

    layer: str
    units: tuple[int, ...]
    values: Tensor
    indices: Tensor
    positions: Tensor
    boxes: Tensor
    size: tuple[int, int]
    n: int
    field: ReceptiveField | None
    reason: str | None
    unread: tuple[str, ...]

    def __repr__(self) -> str:
        n_units, n_patches = self.values.shape
        return f"ActivatingPatches(layer={self.layer!r}, {n_units} units, {n_patches} patches each)"

    def row(self, unit: int) -> int:
        """The row of a unit in the tensors.

        Raises:
            ValueError: the unit is not in `units`.
        """
        if unit not in self.units:
            units = ", ".join(map(str, self.units[:10])) + (", ..." if len(self.units) > 10 else "")
            raise ArgumentError(f"`unit` must be one of {units}, got {unit!r}.", "unit")
        return self.units.index(unit)

    @property
    def places(self) -> Tensor:
        """The old name of `indices`."""
        warn_renamed("places", "indices")
        return self.indices

    @property
    def unclipped_boxes(self) -> Tensor:
        """(U, m, 4): the complete receptive fields, which may extend beyond the image."""
        if self.field is None:
            return self.boxes
        return field_boxes(self.field, self.positions)

    def merge(self, *others: "ActivatingPatches") -> "ActivatingPatches":
        """Merge the results of several processes, which have seen different pictures of a data set.

        Args:
            *others: the results of the other processes.

        Raises:
            ValueError: `others` have another layer, units, size or `n`, or pictures in common.
        """
        parts = (self, *others)
        for other in others:
            changed = describe_changes(self._fingerprint(), other._fingerprint())
            if changed:
                raise ArgumentError(f"`others` are of another run: {changed}.", "others")
        pictures = [set(part.indices.flatten().tolist()) for part in parts]
        if len(set.union(*pictures)) < sum(map(len, pictures)):
            raise ArgumentError(
                "`others` have pictures in common with this one, or each other.", "others"
            )
        values, indices, positions, boxes = (
            torch.cat([getattr(part, name) for part in parts], 1)
            for name in ("values", "indices", "positions", "boxes")
        )
        order = torch.arange(indices.shape[1], device=indices.device).expand(indices.shape)
        for key in (positions[..., 1], positions[..., 0], indices, -values):  # the last comes first
            order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
        order = order[:, : self.n]
        rows = torch.arange(len(indices), device=indices.device)[:, None]
        return replace(
            self,
            values=values[rows, order],
            indices=indices[rows, order],
            positions=positions[rows, order],
            boxes=boxes[rows, order],
            unread=sum((part.unread for part in parts), ()),
        )

    def _fingerprint(self) -> dict[str, Any]:
        names = ("layer", "units", "size", "n", "field", "reason")
        return {name: getattr(self, name) for name in names}

    def picture_boxes(self, data: Any, unit: int) -> Tensor:
        """A unit's boxes in the pixels of the original pictures, (m, 4), before resizing.

        Corners are rounded outwards to whole pixels. The few pixels beyond, which antialiasing
        mixes in, are ignored.

        Args:
            data: the data set of the patches.
            unit: one of `units`.

        Raises:
            ValueError: the unit is unknown, or a picture can no longer be read.
        """
        return torch.stack([box for _, box in self._pictures(data, unit)])

    def crops(self, data: Any, unit: int) -> list[Tensor]:
        """A unit's patches, cropped out of the original pictures: (3, h, w) each, uint8.

        Args:
            data: the data set of the patches.
            unit: one of `units`.

        Raises:
            ValueError: the unit is unknown, or a picture can no longer be read.
        """
        pairs = ((pixels, box.tolist()) for pixels, box in self._pictures(data, unit))
        # Copies: the pixels may be the data set's own.
        return [pixels[:, y1:y2, x1:x2].clone() for pixels, (x1, y1, x2, y2) in pairs]

    def figure(
        self, data: Any, units: Sequence[int] | None = None, *, context: bool = False
    ) -> "Figure":
        """A matplotlib figure with a row of patches for each unit, and their activations as titles.

        Args:
            data: the data set of the patches.
            units: some of `units`. None takes the first ten.
            context: whether to draw whole pictures with boxes instead of patches.

        Raises:
            ValueError: a unit is unknown, or a picture can no longer be read.
        """
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        units = list(self.units[:10] if units is None else units)
        rows, columns = [self.row(unit) for unit in units], self.values.shape[1]
        figure = Figure(
            figsize=(0.3 + 1.1 * columns, 0.1 + 1.3 * len(rows)),
            dpi=150,
            facecolor="white",
            layout="constrained",
        )
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for unit, row, row_axes in zip(units, rows, axes, strict=True):
            pairs = self._pictures(data, unit)
            for axis, (pixels, box), value in zip(row_axes, pairs, self.values[row], strict=True):
                x1, y1, x2, y2 = box.tolist()
                panel = pixels if context else pixels[:, y1:y2, x1:x2]
                axis.imshow(panel.permute(1, 2, 0).numpy())
                if context:
                    corner = (x1 - 0.5, y1 - 0.5)  # pixel 0 extends from -1/2 to 1/2
                    outline: Any = {"fill": False, "color": "red", "lw": 1.5}
                    axis.add_patch(Rectangle(corner, x2 - x1, y2 - y1, **outline))
                axis.set_title(f"{value:.3g}", fontsize=7, pad=2)
                axis.set_xticks([])
                axis.set_yticks([])
            row_axes[0].set_ylabel(f"unit {unit}", fontsize=8)
        return figure

    def _pictures(self, data: Any, unit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A unit's pictures at their own size, (3, h, w), each with the unit's box in it."""
        row = self.row(unit)
        pictures, (height, width) = PictureDataset(data, self.size), self.size
        for index, box in zip(self.indices[row].tolist(), self.boxes[row], strict=True):
            entry_and_pixels = pictures.read(index) if index < len(pictures) else None
            if entry_and_pixels is None:
                raise ArgumentError(f"`data`: picture {index} cannot be read any more.", "data")
            pixels = entry_and_pixels[1]
            new = box.new_tensor([pixels.shape[2], pixels.shape[1]])
            old = box.new_tensor([width, height])
            low, high = box[:2] * new // old, -(-box[2:] * new // old)
            yield pixels, torch.cat([low, high])
