"""The form of all examples: a picture, its class, and the object's boxes and mask."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_ext._repr import fields_repr

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False, repr=False)
class Example:
    """A picture, its class, and the boxes and mask of the object if they are known.

    Attributes:
        image: in RGB; or a tensor (3, H, W) or (1, H, W), uint8.
        target: the class.
        name: the name of the example, which is unique in its data set.
        boxes: (n, 4), int64: (x1, y1, x2, y2) in pixels of the image, half-open: pixel (x, y) is in
            a box where x1 <= x < x2 and y1 <= y < y2. None means unknown; (0, 4) means that the
            class has no object in the image.
        mask: (H, W), bool: the pixels of all objects of the class, or None.
        ignored: (H, W), bool: pixels that count neither as object nor as background, or None.

    Raises:
        TypeError: an image, boxes or masks of another type.
        ValueError: shapes that do not fit; boxes that are empty or not inside the image.

    Example:
        >>> image = torch.zeros(3, 4, 6, dtype=torch.uint8)
        >>> Example(image, 7, "dog/1.jpg", boxes=torch.tensor([[1, 0, 6, 4]])).size
        (4, 6)
    """

    image: "Image | Tensor"
    target: int
    name: str
    boxes: Tensor | None = None
    mask: Tensor | None = None
    ignored: Tensor | None = None

    def __post_init__(self) -> None:
        height, width = self.size
        if self.boxes is not None:
            if not isinstance(self.boxes, Tensor) or self.boxes.dtype != torch.int64:
                raise TypeError(
                    f"`boxes` of {self.name} must be int64, got {_type_of(self.boxes)}."
                )
            if self.boxes.dim() != 2 or self.boxes.shape[1] != 4:
                raise ValueError(
                    f"`boxes` of {self.name} must be (n, 4), got {tuple(self.boxes.shape)}."
                )
            low, high = self.boxes[:, :2], self.boxes[:, 2:]
            end = torch.tensor([width, height], device=self.boxes.device)
            if not bool(((low >= 0) & (low < high) & (high <= end)).all()):
                raise ValueError(
                    f"`boxes` of {self.name} must have 0 <= x1 < x2 <= {width} and "
                    f"0 <= y1 < y2 <= {height}, got {self.boxes.tolist()}."
                )
        for part in ("mask", "ignored"):
            mask = getattr(self, part)
            if mask is None:
                continue
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise TypeError(f"`{part}` of {self.name} must be bool, got {_type_of(mask)}.")
            if mask.shape != (height, width):
                raise ValueError(
                    f"`{part}` of {self.name} must have the image's size {(height, width)}, got "
                    f"{tuple(mask.shape)}."
                )

    def __repr__(self) -> str:
        return fields_repr(self)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        if isinstance(self.image, Tensor):
            shape = tuple(self.image.shape)
            if len(shape) != 3 or shape[0] not in (1, 3) or self.image.dtype != torch.uint8:
                raise TypeError(
                    f"`image` of {self.name} must be uint8, (3, H, W) or (1, H, W), got "
                    f"{self.image.dtype}, {shape}."
                )
            return shape[1], shape[2]
        try:
            width, height = self.image.size
        except (AttributeError, TypeError):
            raise TypeError(
                f"`image` of {self.name} must be a PIL image or a tensor, got {type(self.image)}."
            ) from None
        return height, width


def _type_of(value: object) -> object:
    return value.dtype if isinstance(value, Tensor) else type(value)


def is_difficult(boxes: Tensor, size: tuple[int, int], n_other_classes: int) -> bool:
    """Return whether an example is one of the pointing game's difficult examples.

    An example is difficult if the boxes of its class have less than a quarter of the image's area
    together, and another class is in the image too (Zhang et al., "Top-down Neural Attention by
    Excitation Backprop", 2016). Areas are added, so that the overlap of boxes counts several times.

    Args:
        boxes: (n, 4), (x1, y1, x2, y2), half-open.
        size: (height, width) of the image.
        n_other_classes: the number of other classes with objects in the image.

    Example:
        >>> is_difficult(torch.tensor([[0, 0, 5, 4]]), (10, 10), n_other_classes=1)
        True
        >>> is_difficult(torch.tensor([[0, 0, 5, 5]]), (10, 10), n_other_classes=1)
        False
    """
    area = int((boxes[:, 2:] - boxes[:, :2]).prod(1).sum())
    return 4 * area < size[0] * size[1] and n_other_classes > 0
