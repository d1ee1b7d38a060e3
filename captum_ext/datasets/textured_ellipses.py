"""Textured ellipses among distractors: objects whose extent is known, for localisation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.ndimage import binary_dilation, gaussian_filter
from torch import Tensor
from torch.utils.data import Dataset

from captum_ext._checks import check_choice, check_count
from captum_ext.datasets.examples import Example

if TYPE_CHECKING:
    from PIL.Image import Image

TEXTURES = ("across", "along", "checker", "broad")
CUES = ("body", "half", "head")

_SMALLEST_SIDE = 16
_HEADS = ((0.9, 0.15, 0.15), (0.15, 0.8, 0.2), (0.2, 0.3, 0.95), (0.95, 0.85, 0.1))

_Array = np.ndarray[Any, np.dtype[Any]]
_Random = np.random.RandomState


@dataclass(frozen=True, eq=False, kw_only=True)
class EllipseScene(Example):
    """A picture, and where its object is.

    Attributes:
        image: in RGB.
        target: the class, as its index in `TEXTURES`.
        name: texture, seed and number, as in "checker-0-7".
        boxes: (1, 4), int64: (x1, y1, x2, y2) in pixels, half-open.
        mask: (H, W), bool: the object's pixels.
    """

    image: "Image"
    boxes: Tensor
    mask: Tensor

    @property
    def box(self) -> Tensor:
        """(4,): the one of `boxes`."""
        return self.boxes[0]


class EllipseBatch(NamedTuple):
    """Scenes as tensors.

    Attributes:
        pixels: (N, 3, H, W), uint8.
        targets: (N,), int64.
        masks: (N, H, W), bool.
        boxes: (N, 4), int64.
    """

    pixels: Tensor
    targets: Tensor
    masks: Tensor
    boxes: Tensor


class TexturedEllipses(Dataset[EllipseScene]):
    """Scenes with one object of four classes that differ in their texture, and with distractors.

    The object is a superellipse (exponent 1.7 to 3, 5% to 16% of the picture, 1.1 to 2.4 times as
    long as wide) of any angle and place, in a colour that differs from the background's. One or two
    distractors of the same law of size and place do not touch it, and are plain, noisy or graded.
    The background is a colour with three plane waves and soft noise. The classes are the textures
    that are added to the body, in its own axes, with sides of the picture as the unit of length and
    frequencies off by up to a tenth: sin of 14 cycles along the long axis ("across") or the short
    one ("along"), of 8 in both ("checker"), of 6 along the long axis ("broad").

    Scene i depends on `seed`, i and the options alone (NumPy's frozen `RandomState`). Scenes 4 k to
    4 k + 3 are of the four classes. Masks and boxes are for evaluation; labels are enough to train.

    Args:
        n: how many scenes.
        seed: not negative.
        size: (height, width), each at least 16 pixels.
        cue: where the class shows: "body"; "half", texture on one half of a plain body; or "head",
            the last fifth of a plain body in one of four colours. In the last two, the part that
            tells the class is much smaller than the object.
        has_distractors: whether there are any.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> scenes = TexturedEllipses(1000, seed=0)
        >>> scene = scenes[5]
        >>> scene.image.size, TEXTURES[scene.target], scene.mask.shape
        ((64, 64), 'checker', torch.Size([64, 64]))
        >>> scenes.batch(range(8)).pixels.shape
        torch.Size([8, 3, 64, 64])
    """

    def __init__(
        self,
        n: int = 1000,
        seed: int = 0,
        size: tuple[int, int] = (64, 64),
        cue: str = "body",
        has_distractors: bool = True,
    ) -> None:
        check_count("n", n)
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"`seed` must be an integer in [0, 2**32), got {seed!r}.")
        if not isinstance(size, tuple) or len(size) != 2 or min(size) < _SMALLEST_SIDE:
            raise ValueError(
                f"`size` must be (height, width) of at least {_SMALLEST_SIDE} pixels, got {size}."
            )
        check_choice("cue", cue, CUES)
        self.n, self.seed, self.size = n, seed, size
        self.cue, self.has_distractors = cue, has_distractors

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[EllipseScene]:
        return (self[index] for index in range(self.n))

    def __getitem__(self, index: int) -> EllipseScene:
        from PIL import Image

        pixels, mask = self._drawn(index)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        return EllipseScene(
            image=Image.fromarray(pixels),
            target=self.target(index),
            name=self.name(index),
            boxes=torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]),
            mask=torch.from_numpy(mask),
        )

    def target(self, index: int) -> int:
        """The class of a scene, without drawing it."""
        turn, place = divmod(self._checked(index), len(TEXTURES))
        return int(_Random([self.seed, 0, turn]).permutation(len(TEXTURES))[place])

    def name(self, index: int) -> str:
        """The name of a scene, without drawing it."""
        return f"{TEXTURES[self.target(index)]}-{self.seed}-{self._checked(index)}"

    def batch(self, indices: Sequence[int] | None = None) -> EllipseBatch:
        """Some of the scenes, or all, as tensors."""
        scenes = [self[i] for i in (range(self.n) if indices is None else indices)]
        pixels = np.stack([np.asarray(scene.image) for scene in scenes])
        return EllipseBatch(
            torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
            torch.tensor([scene.target for scene in scenes]),
            torch.stack([scene.mask for scene in scenes]),
            torch.stack([scene.box for scene in scenes]),
        )

    def _checked(self, index: int) -> int:
        if not -self.n <= index < self.n:
            raise IndexError(f"scene {index} of {self.n}")
        return index % self.n

    def _drawn(self, index: int) -> tuple[_Array, _Array]:
        """Pixels (H, W, 3) in uint8, and the object's mask."""
        random = _Random([self.seed, 1, self._checked(index)])
        color = random.uniform(0.25, 0.75, 3)
        canvas = color + _background(random, self.size)
        form = _Form(random)
        u, v, cover = form.laid(self.size)
        mask = cover >= 0.5
        body = _body_color(random, color) + _texture(
            random, self.target(index), u, v, self.cue, form
        )
        body = body + random.normal(0, 0.02, (*self.size, 3))
        near = binary_dilation(mask, np.ones((3, 3)))
        for _ in range(random.randint(1, 3)):
            places = [_Form(random).laid(self.size) for _ in range(12)]
            free = [place for place in places if not (near & (place[2] > 0)).any()]
            painted = _body_color(random, color) + _neutral(random, self.size, free)
            if free and self.has_distractors:
                canvas += free[0][2][..., None] * (painted - canvas)
        canvas += cover[..., None] * (body - canvas)
        return np.rint(255 * canvas.clip(0, 1)).astype(np.uint8), mask


class _Form:
    """A superellipse: |u / a|^e + |v / b|^e <= 1 in its own axes; sides of the picture are 1."""

    def __init__(self, random: _Random) -> None:
        self.exponent = random.uniform(1.7, 3)
        area, aspect, angle = (random.uniform(*r) for r in ((0.05, 0.16), (1.1, 2.4), (0, np.pi)))
        self.axes = np.sqrt(area / np.pi * np.array([aspect, 1 / aspect]))
        self.frame = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        dual = self.exponent / (self.exponent - 1)
        reach = ((self.axes[:, None] * np.abs(self.frame)) ** dual).sum(0) ** (1 / dual)
        self.center = reach + random.uniform(0, 1, 2) * np.maximum(1 - 2 * reach, 0)

    def laid(self, size: tuple[int, int]) -> tuple[_Array, _Array, _Array]:
        """U, v and the opacity of each pixel, (H, W)."""
        y, x = np.meshgrid(*((np.arange(n) + 0.5) / n for n in size), indexing="ij")
        u, v = (a * (x - self.center[0]) + b * (y - self.center[1]) for a, b in self.frame)
        long, short = self.axes
        radius = (np.abs(u / long) ** self.exponent + np.abs(v / short) ** self.exponent) ** (
            1 / self.exponent
        )
        return u, v, ((1 - radius) * short * min(size) + 0.5).clip(0, 1)


def _background(random: _Random, size: tuple[int, int]) -> _Array:
    """Three plane waves and soft noise, (H, W, 3)."""
    y, x = np.meshgrid(*((np.arange(n) + 0.5) / n for n in size), indexing="ij")
    total = np.zeros((*size, 3))
    for _ in range(3):
        cycles, angle, phase = (random.uniform(*r) for r in ((1, 3), (0, np.pi), (0, 2 * np.pi)))
        wave = np.sin(2 * np.pi * cycles * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        total += wave[..., None] * random.normal(0, 0.05, 3)
    noise = random.normal(0, 0.08, (*size, 3))
    grain = 1.2 * min(size) / 64
    soft: _Array = total + 2.2 * gaussian_filter(noise, (grain, grain, 0), mode="wrap")
    return soft


def _body_color(random: _Random, background: _Array) -> _Array:
    """A colour at a distance of more than 1/2 from the background's, summed over channels."""
    colors = random.uniform(0.2, 0.8, (64, 3))
    apart = np.abs(colors - background).sum(1)
    chosen: _Array = (
        colors[np.argmax(apart > 0.5)] if (apart > 0.5).any() else colors[apart.argmax()]
    )
    return chosen


def _texture(random: _Random, target: int, u: _Array, v: _Array, cue: str, form: _Form) -> _Array:
    """What the class adds to the body's colour, (H, W, 3) or (H, W, 1)."""
    turn = 2 * np.pi * random.uniform(0.9, 1.1, 2)
    phases = random.uniform(0, 2 * np.pi, 2)
    if cue == "head":
        at_end = u > 0.6 * form.axes[0]
        color: _Array = 0.5 * at_end[..., None] * (2 * np.array(_HEADS[target]) - 1)
        return color
    waves = {
        "across": lambda: np.sin(14 * turn[0] * u + phases[0]),
        "along": lambda: np.sin(14 * turn[0] * v + phases[0]),
        "checker": lambda: (
            1.4 * np.sin(8 * turn[0] * u + phases[0]) * np.sin(8 * turn[1] * v + phases[1])
        ),
        "broad": lambda: np.sin(6 * turn[0] * u + phases[0]),
    }
    wave = 0.22 * waves[TEXTURES[target]]()
    texture: _Array = (wave * (u > 0) if cue == "half" else wave)[..., None]
    return texture


def _neutral(
    random: _Random, size: tuple[int, int], free: list[tuple[_Array, _Array, _Array]]
) -> _Array:
    """What a distractor adds to its colour."""
    kind = random.randint(3)
    noise = random.normal(0, 0.16, (*size, 3))
    strength = random.uniform(-0.3, 0.3)
    if kind == 1:
        return noise
    flat: _Array = 0.02 / 0.16 * noise
    if kind == 2 and free:
        u, v, _ = free[0]
        flat = flat + strength * (np.hypot(u, v) / 0.3)[..., None]
    return flat
