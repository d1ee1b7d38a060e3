"""Beetles of one body plan whose species is a small mark on the back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_ext._checks import check_count
from captum_ext.datasets._beetles import Random, draw
from captum_ext.datasets.examples import Example

if TYPE_CHECKING:
    from PIL.Image import Image

PATTERNS = ("horizontal", "vertical", "rising", "falling", "checker", "rings", "dots", "rays")
MEAN, STD = 0.5, 0.25

_SMALLEST_SIDE = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class Specimen(Example):
    """A picture of a beetle, and where its mark is.

    Attributes:
        image: in RGB.
        target: the class, as its index in `PATTERNS`.
        name: pattern, seed and number, as in "rings-0-7"; without a mark "none-0-7".
        boxes: (1, 4), int64: the box of the mark, (x1, y1, x2, y2) in pixels, half-open.
        mask: (H, W), bool: the pixels that the mark touches.
        body: (H, W), bool: the pixels that the beetle covers by at least half.
    """

    image: "Image"
    boxes: Tensor
    mask: Tensor
    body: Tensor

    @property
    def part(self) -> Tensor:
        """The `mask`: what tells the class is a part of the object."""
        return self.mask

    @property
    def box(self) -> Tensor:
        """(4,): the one of `boxes`."""
        return self.boxes[0]


class Batch(NamedTuple):
    """Specimens as tensors.

    Attributes:
        images: (N, 3, H, W), float32: (pixel - `MEAN`) / `STD`, pixels in [0, 1].
        targets: (N,), int64.
        parts: (N, H, W), bool.
    """

    images: Tensor
    targets: Tensor
    parts: Tensor


class FineGrainedParts(Dataset[Specimen]):
    """Eight species of beetles that differ in the pattern of one small mark and in nothing else.

    A beetle of random pose, size, colours and texture, mirrored or not, sits on a textured
    background (soft noise, a coarse grating, or grass). On its back, anywhere, is an elliptic mark
    of two random colours, 30 to 46 pixels across in a picture of 224: 1.6% to 3.4% of the
    picture. A pattern fills the mark, most of them of 8 to 12 pixels a period (the checker board
    half as much more, seven rays a turn), and the pattern is the class: horizontal,
    vertical, rising or falling stripes, a checker board, rings, dots or rays. Beside the beetle lie
    up to three distractors of the mark's sizes and colours, plain, in two halves, graded or
    blotched, which tell nothing of the class. All of it scales with the picture's shorter side.

    Specimen i depends on `seed`, i and `size` alone. All its random numbers (NumPy's frozen
    `RandomState`) are drawn without a look at the class, so the pictures that `variant` gives for
    other classes are equal outside the mark. Specimens 8 k to 8 k + 7 are of the eight classes.

    Args:
        n: how many specimens.
        seed: not negative.
        size: (height, width) of the pictures, each at least 64 pixels.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> specimen = FineGrainedParts(40, seed=1)[5]
        >>> specimen.image.size, PATTERNS[specimen.target], int(specimen.part.sum())
        ((224, 224), 'checker', 1370)
        >>> images, targets, parts = FineGrainedParts(40, seed=1).batch(range(4))
        >>> images.shape, targets.tolist(), parts.shape
        (torch.Size([4, 3, 224, 224]), [6, 2, 3, 7], torch.Size([4, 224, 224]))
    """

    def __init__(self, n: int = 40, seed: int = 0, size: tuple[int, int] = (224, 224)) -> None:
        check_count("n", n)
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"`seed` must be an integer in [0, 2**32), got {seed!r}.")
        if not isinstance(size, tuple) or len(size) != 2 or min(size) < _SMALLEST_SIDE:
            raise ValueError(
                f"`size` must be (height, width) of at least {_SMALLEST_SIDE} pixels, got {size}."
            )
        self.n, self.seed, self.size = n, seed, size

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Specimen]:
        return (self[index] for index in range(self.n))

    def __getitem__(self, index: int) -> Specimen:
        return self.variant(index, self.target(index))

    def target(self, index: int) -> int:
        """The class of a specimen, without drawing it."""
        turn, place = divmod(self._checked(index), len(PATTERNS))
        return int(Random([self.seed, 0, turn]).permutation(len(PATTERNS))[place])

    def name(self, index: int) -> str:
        """The name of a specimen, without drawing it."""
        return self._named(index, self.target(index))

    def _named(self, index: int, target: int | None) -> str:
        pattern = "none" if target is None else PATTERNS[target]
        return f"{pattern}-{self.seed}-{self._checked(index)}"

    def variant(self, index: int, target: int | None) -> Specimen:
        """The same picture with the mark of another class, or with none.

        Args:
            index: of the specimen.
            target: the class; None leaves the mark out and shows the back that is under it. The
                `part` is where the mark would be then, and the `target` is the specimen's own.
        """
        if target is not None and not 0 <= target < len(PATTERNS):
            raise ValueError(f"`target` must be in [0, {len(PATTERNS)}) or None, got {target}.")
        from PIL import Image

        random = Random([self.seed, 1, self._checked(index)])
        pixels, part, body = draw(random, None if target is None else PATTERNS[target], self.size)
        rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
        return Specimen(
            image=Image.fromarray(pixels),
            target=self.target(index) if target is None else target,
            name=self._named(index, target),
            boxes=torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]),
            mask=torch.from_numpy(part),
            body=torch.from_numpy(body),
        )

    def batch(self, indices: Sequence[int] | None = None) -> Batch:
        """Some of the specimens, or all, as tensors for a network."""
        specimens = [self[i] for i in (range(self.n) if indices is None else indices)]
        return Batch(
            normalized(stacked([specimen.image for specimen in specimens])),
            torch.tensor([specimen.target for specimen in specimens]),
            torch.stack([specimen.part for specimen in specimens]),
        )

    def _checked(self, index: int) -> int:
        if not -self.n <= index < self.n:
            raise IndexError(f"specimen {index} of {self.n}")
        return index % self.n


def stacked(images: "Sequence[Image]") -> Tensor:
    """Pictures of one size as bytes: (N, 3, H, W), uint8."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def normalized(pixels: Tensor) -> Tensor:
    """What a network of these data takes, of bytes: (value / 255 - `MEAN`) / `STD` in float32."""
    return (pixels.float() - 255 * MEAN) / (255 * STD)
