"""Beetles of one body plan, whose species is a small mark on the back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_ext._errors import ArgumentError
from captum_ext._repr import fields_repr
from captum_ext.datasets._beetles import render_beetle
from captum_ext.datasets._seeded import Random, SeededDataset, box_around
from captum_ext.datasets.examples import Example

if TYPE_CHECKING:
    from PIL.Image import Image

PATTERNS = ("horizontal", "vertical", "rising", "falling", "checker", "rings", "dots", "rays")
MEAN, STD = 0.5, 0.25


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BeetleExample(Example):
    """A picture of a beetle, its mark and its body.

    Attributes:
        image: in RGB.
        target: the index of the class in `PATTERNS`.
        name: pattern, seed and number, as in "rings-0-7"; without a mark "none-0-7".
        boxes: (1, 4), int64: the box of the mark, (x1, y1, x2, y2) in pixels, half-open.
        mask: (H, W), bool: the pixels that the mark touches.
        body: (H, W), bool: the pixels that the beetle covers by at least half.

    Example:
        >>> FineGrainedParts(8, size=(64, 64))[0].box.shape
        torch.Size([4])
    """

    image: "Image"
    boxes: Tensor
    mask: Tensor
    body: Tensor

    @property
    def part(self) -> Tensor:
        """The `mask`: the part of the object that shows its class."""
        return self.mask

    @property
    def box(self) -> Tensor:
        """The only one of `boxes`, (4,)."""
        return self.boxes[0]


class BeetleBatch(NamedTuple):
    """Beetles as tensors.

    Attributes:
        images: (N, 3, H, W), float32: (pixel - `MEAN`) / `STD`, pixels in [0, 1].
        targets: (N,), int64.
        parts: (N, H, W), bool: the pixels of the marks.

    Example:
        >>> FineGrainedParts(8, size=(64, 64)).batch([0, 1]).images.shape
        torch.Size([2, 3, 64, 64])
    """

    images: Tensor
    targets: Tensor
    parts: Tensor

    def __repr__(self) -> str:
        return fields_repr(self)


class FineGrainedParts(SeededDataset[BeetleExample]):
    """Eight species of beetles that differ only in the pattern of one small mark.

    A beetle of random pose, size, colours and texture, mirrored or not, sits on a textured
    background (soft noise, a coarse grating, or grass). On its back, anywhere, is an elliptic mark
    of two random colours, 30 to 46 pixels across in a picture of 224: 1.6% to 3.4% of the
    picture. A pattern fills the mark, most of them of 8 to 12 pixels a period (the checker board
    half as much more, seven rays a turn), and the pattern is the class: horizontal,
    vertical, rising or falling stripes, a checker board, rings, dots or rays. Beside the beetle lie
    up to three distractors of the mark's sizes and colours, plain, in two halves, graded or
    blotched, which say nothing about the class. All sizes scale with the picture's shorter side.

    Example i depends on `seed`, i and `size` alone. Its random numbers (NumPy's frozen
    `RandomState`) do not depend on the class, so that the pictures of `variant` for other classes
    are equal outside the mark. Examples 8 k to 8 k + 7 are of the eight classes.

    Args:
        n: the number of examples.
        seed: at least 0 and below 2**32.
        size: (height, width) of the pictures, each at least 64 pixels.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> beetle = FineGrainedParts(40, seed=1)[5]
        >>> beetle.image.size, PATTERNS[beetle.target], int(beetle.part.sum())
        ((224, 224), 'checker', 1370)
        >>> images, targets, parts = FineGrainedParts(40, seed=1).batch(range(4))
        >>> images.shape, targets.tolist(), parts.shape
        (torch.Size([4, 3, 224, 224]), [6, 2, 3, 7], torch.Size([4, 224, 224]))
    """

    smallest_side = 64

    def __init__(self, n: int = 40, seed: int = 0, size: tuple[int, int] = (224, 224)) -> None:
        super().__init__(n, seed, size)

    def __getitem__(self, index: int) -> BeetleExample:
        return self.variant(index, self.target(index))

    def target(self, index: int) -> int:
        """The class of an example, without drawing its picture."""
        return self._shuffled_class(index, len(PATTERNS))

    def name(self, index: int) -> str:
        """The name of an example, without drawing its picture."""
        return self._variant_name(index, self.target(index))

    def _variant_name(self, index: int, target: int | None) -> str:
        pattern = "none" if target is None else PATTERNS[target]
        return f"{pattern}-{self.seed}-{self._checked_index(index)}"

    def variant(self, index: int, target: int | None) -> BeetleExample:
        """The same picture with the mark of another class, or without a mark.

        Args:
            index: the index of the example.
            target: the class. None leaves the mark out and shows the bare back; `part` is then the
                region of the missing mark, and `target` remains the class of the example.

        Raises:
            ValueError: a class out of range.
            IndexError: an index out of range.
        """
        if target is not None and not 0 <= target < len(PATTERNS):
            raise ArgumentError(
                f"`target` must be in [0, {len(PATTERNS)}) or None, got {target}.", "target"
            )
        from PIL import Image

        random = Random([self.seed, 1, self._checked_index(index)])
        pattern = None if target is None else PATTERNS[target]
        pixels, part, body = render_beetle(random, pattern, self.size)
        return BeetleExample(
            image=Image.fromarray(pixels),
            target=self.target(index) if target is None else target,
            name=self._variant_name(index, target),
            boxes=box_around(part),
            mask=torch.from_numpy(part),
            body=torch.from_numpy(body),
        )

    def batch(self, indices: Sequence[int] | None = None) -> BeetleBatch:
        """The examples at `indices`, or all, as tensors for a network."""
        beetles = [self[i] for i in (range(self.n) if indices is None else indices)]
        return BeetleBatch(
            normalized(stacked([beetle.image for beetle in beetles])),
            torch.tensor([beetle.target for beetle in beetles], device="cpu"),
            torch.stack([beetle.part for beetle in beetles]),
        )


def stacked(images: "Sequence[Image]") -> Tensor:
    """Pictures of one size as bytes: (N, 3, H, W), uint8."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def normalized(pixels: Tensor) -> Tensor:
    """Bytes as the input of a network, (value / 255 - `MEAN`) / `STD`, in float32."""
    return (pixels.float() - 255 * MEAN) / (255 * STD)
