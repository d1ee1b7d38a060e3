"""Textured ellipses among distractors: objects of known extent, for localisation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.ndimage import binary_dilation, gaussian_filter
from torch import Tensor

from captum_ext._checks import check_choice
from captum_ext._repr import fields_repr
from captum_ext.datasets._seeded import Array, Random, SeededDataset, box_around
from captum_ext.datasets.examples import Example

if TYPE_CHECKING:
    from PIL.Image import Image

TEXTURES = ("across", "along", "checker", "broad")
CUES = ("body", "half", "head")

_HEAD_COLORS = ((0.9, 0.15, 0.15), (0.15, 0.8, 0.2), (0.2, 0.3, 0.95), (0.95, 0.85, 0.1))


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class EllipseScene(Example):
    """A picture of a textured ellipse among distractors.

    Attributes:
        image: in RGB.
        target: the index of the class in `TEXTURES`.
        name: texture, seed and number, as in "checker-0-7".
        boxes: (1, 4), int64: (x1, y1, x2, y2) in pixels, half-open.
        mask: (H, W), bool: the object's pixels.

    Example:
        >>> scene = TexturedEllipses(8, seed=1)[0]
        >>> scene.name, scene.box.shape
        ('checker-1-0', torch.Size([4]))
    """

    image: "Image"
    boxes: Tensor
    mask: Tensor

    @property
    def box(self) -> Tensor:
        """The only one of `boxes`, (4,)."""
        return self.boxes[0]


class EllipseBatch(NamedTuple):
    """Scenes as tensors.

    Attributes:
        pixels: (N, 3, H, W), uint8.
        targets: (N,), int64.
        masks: (N, H, W), bool.
        boxes: (N, 4), int64.

    Example:
        >>> TexturedEllipses(8).batch([0, 1]).masks.shape
        torch.Size([2, 64, 64])
    """

    pixels: Tensor
    targets: Tensor
    masks: Tensor
    boxes: Tensor

    def __repr__(self) -> str:
        return fields_repr(self)


class TexturedEllipses(SeededDataset[EllipseScene]):
    """Scenes with distractors and one object, whose four classes differ in their texture.

    The object is a superellipse (exponent 1.7 to 3, 5% to 16% of the picture, 1.1 to 2.4 times as
    long as wide) of any angle and position, in a colour that differs from the background's. One or
    two distractors of the same distribution of size and position do not touch it. They are plain,
    noisy or graded. The background is a colour with three plane waves and soft noise. The classes
    are textures that are added to the body, along its own axes. The unit of length is the side of
    the picture, and frequencies are off by up to a tenth: sin of 14 cycles along the long axis
    ("across") or the short one ("along"), of 8 in both ("checker"), of 6 along the long axis
    ("broad").

    Scene i depends on `seed`, i and the options alone (NumPy's frozen `RandomState`). Scenes 4 k to
    4 k + 3 are of the four classes. Masks and boxes are for evaluation; labels are enough to train.

    Args:
        n: the number of scenes.
        seed: at least 0 and below 2**32.
        size: (height, width), each at least 16 pixels.
        cue: the part that shows the class: "body"; "half", texture on one half of a plain body; or
            "head", the last fifth of a plain body in one of four colours. The last two are much
            smaller than the object.
        has_distractors: whether there are distractors.

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

    smallest_side = 16

    def __init__(
        self,
        n: int = 1000,
        seed: int = 0,
        size: tuple[int, int] = (64, 64),
        cue: str = "body",
        has_distractors: bool = True,
    ) -> None:
        super().__init__(n, seed, size)
        check_choice("cue", cue, CUES)
        self.cue, self.has_distractors = cue, has_distractors

    def __getitem__(self, index: int) -> EllipseScene:
        from PIL import Image

        pixels, mask = self._render(index)
        return EllipseScene(
            image=Image.fromarray(pixels),
            target=self.target(index),
            name=self.name(index),
            boxes=box_around(mask),
            mask=torch.from_numpy(mask),
        )

    def target(self, index: int) -> int:
        """The class of a scene, without drawing it."""
        return self._shuffled_class(index, len(TEXTURES))

    def name(self, index: int) -> str:
        """The name of a scene, without drawing it."""
        return f"{TEXTURES[self.target(index)]}-{self.seed}-{self._checked_index(index)}"

    def batch(self, indices: Sequence[int] | None = None) -> EllipseBatch:
        """The scenes at `indices`, or all, as tensors."""
        scenes = [self[i] for i in (range(self.n) if indices is None else indices)]
        pixels = np.stack([np.asarray(scene.image) for scene in scenes])
        return EllipseBatch(
            torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
            torch.tensor([scene.target for scene in scenes], device="cpu"),
            torch.stack([scene.mask for scene in scenes]),
            torch.stack([scene.box for scene in scenes]),
        )

    def _render(self, index: int) -> tuple[Array, Array]:
        """Pixels (H, W, 3) in uint8, and the object's mask."""
        random = Random([self.seed, 1, self._checked_index(index)])
        color = random.uniform(0.25, 0.75, 3)
        canvas = color + _background(random, self.size)
        shape = _Superellipse(random)
        u, v, opacity = shape.render(self.size)
        mask = opacity >= 0.5
        body = _body_color(random, color) + _class_texture(
            random, self.target(index), u, v, self.cue, shape
        )
        body = body + random.normal(0, 0.02, (*self.size, 3))
        near_object = binary_dilation(mask, np.ones((3, 3)))
        for _ in range(random.randint(1, 3)):
            candidates = [_Superellipse(random).render(self.size) for _ in range(12)]
            free = [layer for layer in candidates if not (near_object & (layer[2] > 0)).any()]
            distractor = _body_color(random, color) + _distractor_texture(random, self.size, free)
            if free and self.has_distractors:
                canvas += free[0][2][..., None] * (distractor - canvas)
        canvas += opacity[..., None] * (body - canvas)
        return np.rint(255 * canvas.clip(0, 1)).astype(np.uint8), mask


class _Superellipse:
    """A random superellipse |u / a|^e + |v / b|^e <= 1, with the side of the picture as unit."""

    def __init__(self, random: Random) -> None:
        self.exponent = random.uniform(1.7, 3)
        area, aspect, angle = (random.uniform(*r) for r in ((0.05, 0.16), (1.1, 2.4), (0, np.pi)))
        self.axes = np.sqrt(area / np.pi * np.array([aspect, 1 / aspect]))
        self.frame = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        dual = self.exponent / (self.exponent - 1)
        reach = ((self.axes[:, None] * np.abs(self.frame)) ** dual).sum(0) ** (1 / dual)
        self.center = reach + random.uniform(0, 1, 2) * np.maximum(1 - 2 * reach, 0)

    def render(self, size: tuple[int, int]) -> tuple[Array, Array, Array]:
        """The coordinates u and v and the opacity of each pixel, (H, W) each."""
        y, x = np.meshgrid(*((np.arange(n) + 0.5) / n for n in size), indexing="ij")
        u, v = (a * (x - self.center[0]) + b * (y - self.center[1]) for a, b in self.frame)
        long, short = self.axes
        radius = (np.abs(u / long) ** self.exponent + np.abs(v / short) ** self.exponent) ** (
            1 / self.exponent
        )
        return u, v, ((1 - radius) * short * min(size) + 0.5).clip(0, 1)


def _background(random: Random, size: tuple[int, int]) -> Array:
    """Three plane waves and soft noise, (H, W, 3)."""
    y, x = np.meshgrid(*((np.arange(n) + 0.5) / n for n in size), indexing="ij")
    total = np.zeros((*size, 3))
    for _ in range(3):
        cycles, angle, phase = (random.uniform(*r) for r in ((1, 3), (0, np.pi), (0, 2 * np.pi)))
        wave = np.sin(2 * np.pi * cycles * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        total += wave[..., None] * random.normal(0, 0.05, 3)
    noise = random.normal(0, 0.08, (*size, 3))
    grain = 1.2 * min(size) / 64
    soft: Array = total + 2.2 * gaussian_filter(noise, (grain, grain, 0), mode="wrap")
    return soft


def _body_color(random: Random, background: Array) -> Array:
    """A colour at a distance above 1/2 from the background's, summed over channels."""
    colors = random.uniform(0.2, 0.8, (64, 3))
    distances = np.abs(colors - background).sum(1)
    is_far = distances > 0.5
    color: Array = colors[np.argmax(is_far) if is_far.any() else distances.argmax()]
    return color


def _class_texture(
    random: Random, target: int, u: Array, v: Array, cue: str, shape: _Superellipse
) -> Array:
    """The texture of a class, to add to the body's colour: (H, W, 3) or (H, W, 1)."""
    cycle = 2 * np.pi * random.uniform(0.9, 1.1, 2)
    phases = random.uniform(0, 2 * np.pi, 2)
    if cue == "head":
        is_head = u > 0.6 * shape.axes[0]
        color: Array = 0.5 * is_head[..., None] * (2 * np.array(_HEAD_COLORS[target]) - 1)
        return color
    waves = {
        "across": lambda: np.sin(14 * cycle[0] * u + phases[0]),
        "along": lambda: np.sin(14 * cycle[0] * v + phases[0]),
        "checker": lambda: (
            1.4 * np.sin(8 * cycle[0] * u + phases[0]) * np.sin(8 * cycle[1] * v + phases[1])
        ),
        "broad": lambda: np.sin(6 * cycle[0] * u + phases[0]),
    }
    wave = 0.22 * waves[TEXTURES[target]]()
    texture: Array = (wave * (u > 0) if cue == "half" else wave)[..., None]
    return texture


def _distractor_texture(
    random: Random, size: tuple[int, int], free: list[tuple[Array, Array, Array]]
) -> Array:
    """A plain, noisy or graded texture, to add to a distractor's colour: (H, W, 3)."""
    choice = random.randint(3)
    noise = random.normal(0, 0.16, (*size, 3))
    strength = random.uniform(-0.3, 0.3)
    if choice == 1:
        return noise
    texture: Array = 0.02 / 0.16 * noise
    if choice == 2 and free:
        u, v, _ = free[0]
        texture = texture + strength * (np.hypot(u, v) / 0.3)[..., None]
    return texture
