"""Beetles of one body plan whose species is a small mark on the back, drawn with NumPy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_ext._checks import check_count
from captum_ext.datasets.examples import Example

if TYPE_CHECKING:
    from PIL.Image import Image

PATTERNS = ("horizontal", "vertical", "rising", "falling", "checker", "rings", "dots", "rays")
MEAN, STD = 0.5, 0.25

_SMALLEST_SIDE = 64
_NEUTRAL = ("plain", "halves", "gradient", "blotches")

_Array = np.ndarray[Any, np.dtype[Any]]
_Random = np.random.RandomState


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
        return int(_Random([self.seed, 0, turn]).permutation(len(PATTERNS))[place])

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

        random = _Random([self.seed, 1, self._checked(index)])
        pixels, part, body = _draw(random, None if target is None else PATTERNS[target], self.size)
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


# --- a picture -----------------------------------------------------------------------------------


def _draw(
    random: _Random, pattern: str | None, size: tuple[int, int]
) -> tuple[_Array, _Array, _Array]:
    """Pixels (H, W, 3) in uint8, the mark's mask and the beetle's."""
    unit = min(size) / 224
    canvas = _background(random, size, unit)
    pose = _pose(random, size, unit)
    mark = _spot(random, unit)
    mark.center = pose.inside(random, max(mark.radii) + 2 * unit)
    distractors = [_spot(random, unit) for _ in range(random.randint(4))]
    for spot in distractors:
        if _settle(random, spot, pose, size):
            _paint(canvas, spot, spot.pattern)
    body = _beetle(random, canvas, pose, unit)
    part = _cover(mark, size)
    if pattern is not None:
        _paint(canvas, mark, pattern)
    canvas *= 255
    pixels = np.rint(canvas, out=canvas).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)), part > 0, body


def _background(random: _Random, size: tuple[int, int], unit: float) -> _Array:
    kind = random.randint(3)
    colors = _colors(random, 0.15, 0.85)
    if kind == 0:
        cells = random.uniform(6, 24)
        texture = _noise(random, size, (cells, cells))
    elif kind == 1:
        angle, period = random.uniform(0, np.pi), random.uniform(28, 70) * unit
        y, x = (2 * np.pi / period * np.arange(side, dtype=np.float32) for side in size)
        phase = random.uniform(0, 2 * np.pi)
        wave = np.exp(1j * (np.sin(angle) * y + phase))[:, None] * np.exp(1j * np.cos(angle) * x)
        texture = 0.5 + 0.5 * wave.imag.astype(np.float32)
    else:
        long, short = random.uniform(3, 7), random.uniform(40, 80)
        texture = _noise(random, size, (long, short) if random.randint(2) else (short, long))
    fine = _noise(random, size, (56, 56))
    texture = 0.75 * texture + 0.25 * fine
    return _mixed(colors, texture)


@dataclass
class _Pose:
    """The ellipse of the back: its centre (x, y), half axes, and the unit vector to the head."""

    center: _Array
    axes: tuple[float, float]
    forward: _Array
    side: float  # of the mirroring

    @property
    def frame(self) -> _Array:
        """Rows: forward and sideways."""
        x, y = self.forward
        return np.array([[x, y], [-self.side * y, self.side * x]])

    def inside(self, random: _Random, margin: float) -> _Array:
        """A point of the back at least about `margin` from its edge."""
        angle, radius = random.uniform(0, 2 * np.pi), np.sqrt(random.uniform())
        long, short = (axis - margin for axis in self.axes)
        there = radius * np.array([long * np.cos(angle), short * np.sin(angle)])
        place: _Array = self.center + there @ self.frame
        return place

    def reaches(self, point: _Array, margin: float) -> bool:
        """Whether a point is nearer than about `margin` to the back or the head."""
        u, v = self.frame @ (point - self.center)
        long, short = (axis + margin for axis in self.axes)
        head = np.hypot(u - 1.05 * self.axes[0], v) < 0.55 * self.axes[1] + margin
        return bool((u / long) ** 2 + (v / short) ** 2 < 1 or head)


def _pose(random: _Random, size: tuple[int, int], unit: float) -> _Pose:
    center = np.array([random.uniform(0.38, 0.62) * side for side in size[::-1]])
    axes = (random.uniform(56, 68) * unit, random.uniform(38, 46) * unit)
    angle = random.uniform(0, 2 * np.pi)
    return _Pose(center, axes, np.array([np.cos(angle), np.sin(angle)]), random.choice([-1.0, 1.0]))


def _beetle(random: _Random, canvas: _Array, pose: _Pose, unit: float) -> _Array:
    """Draws legs, feelers, head and back; returns the mask of all of them."""
    from PIL import Image, ImageDraw

    _, *size = canvas.shape
    long, short = pose.axes
    skin, shell = _colors(random, 0.05, 0.35)[0], _colors(random, 0.2, 0.9)
    drawn = Image.new("L", (2 * size[1], 2 * size[0]))
    pen = ImageDraw.Draw(drawn)

    def at(points: _Array) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in 2 * (pose.center + points @ pose.frame)]

    for side in (-1, 1):
        for leg, swing in zip((0.55, 0.0, -0.5), random.uniform(-0.2, 0.2, 3), strict=True):
            hip = np.array([leg * long, side * 0.8 * short])
            knee = hip + short * np.array([0.5 * leg + swing, side * 0.5])
            foot = knee + short * np.array([0.6 * leg - 0.2 + swing, side * 0.3])
            pen.line(at(np.stack([hip, knee, foot])), 255, round(10 * unit), joint="curve")
        bend = random.uniform(-0.15, 0.15)
        feeler = np.array([[1.2, 0.1 * side], [1.45, 0.25 * side + bend], [1.6, 0.3 * side + bend]])
        pen.line(at(feeler * [long, short]), 255, round(6 * unit), joint="curve")
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], 1)
    pen.polygon(at(circle * 0.5 * short + [1.05 * long, 0]), 255)
    cover = np.asarray(drawn.resize((size[1], size[0]), Image.Resampling.BOX)) / np.float32(255)
    canvas += cover * (skin[:, None, None] - canvas)

    (x, y), reach = pose.center, long + 2
    columns, rows = _span(x, reach, size[1]), _span(y, reach, size[0])
    dx, dy = np.arange(*columns) - x, (np.arange(*rows) - y)[:, None]
    u, v = ((dx * a + dy * b).astype(np.float32) for a, b in pose.frame)
    radius = np.hypot(u / long, v / short)
    back = ((1 - radius) * short + 0.5).clip(0, 1)
    seam = 0.5 + 0.5 * (np.abs(v) / (1.5 * unit)).clip(0, 1)
    cells = random.uniform(4, 8)
    window = (..., slice(*rows), slice(*columns))
    light = (1 - 0.45 * radius * radius) * seam
    color = _mixed(shell, _noise(random, radius.shape, (cells, cells))) * light
    canvas[window] += back * (color - canvas[window])
    cover[window] = np.maximum(cover[window], back)
    return cover >= 0.5


# --- marks and distractors -----------------------------------------------------------------------


@dataclass
class _Spot:
    """An ellipse that two colours fill."""

    radii: tuple[float, float]
    tilt: float
    colors: _Array
    period: float
    phases: _Array
    turn: float
    grid: _Array  # of the blotches
    pattern: str  # of a distractor
    center: _Array


def _spot(random: _Random, unit: float) -> _Spot:
    radii = (random.uniform(15, 23) * unit, random.uniform(15, 23) * unit)
    return _Spot(
        radii,
        tilt=random.uniform(0, np.pi),
        colors=_spot_colors(random),
        period=random.uniform(8, 12) * unit,
        phases=random.uniform(0, 2 * np.pi, 2),
        turn=random.uniform(-0.15, 0.15),
        grid=random.uniform(0, 1, (4, 4)),
        pattern=_NEUTRAL[random.randint(len(_NEUTRAL))],
        center=np.zeros(2),
    )


def _spot_colors(random: _Random) -> _Array:
    """A dark and a light colour, of which one channel may be exchanged, in a random order."""
    colors = np.stack([random.uniform(0, 0.4, 3), random.uniform(0.6, 1, 3)])
    channel = random.randint(4)
    if channel < 3:
        colors[:, channel] = colors[::-1, channel]
    return colors[:: random.choice([-1, 1])].astype(np.float32)


def _settle(random: _Random, spot: _Spot, pose: _Pose, size: tuple[int, int]) -> bool:
    """Looks for a place beside the beetle; twelve draws whatever they find."""
    reach = max(spot.radii)
    places = [
        np.array([random.uniform(reach, side - reach) for side in size[::-1]]) for _ in range(12)
    ]
    free = [place for place in places if not pose.reaches(place, reach + 2)]
    if free:
        spot.center = free[0]
    return bool(free)


def _cover(spot: _Spot, size: tuple[int, int]) -> _Array:
    """The opacity of a spot, (H, W)."""
    cover = np.zeros(size, dtype=np.float32)
    window, _, _, inside = _patch(spot, size)
    cover[window] = inside
    return cover


def _paint(canvas: _Array, spot: _Spot, pattern: str) -> None:
    window, x, y, inside = _patch(spot, (canvas.shape[1], canvas.shape[2]))
    color = _mixed(spot.colors, _pattern(pattern, spot, x, y))
    canvas[:, *window] += inside * (color - canvas[:, *window])


def _patch(
    spot: _Spot, size: tuple[int, int]
) -> tuple[tuple[slice, slice], _Array, _Array, _Array]:
    """The window around a spot, x and y from its centre there, and its opacity there."""
    reach = max(spot.radii) + 2
    columns, rows = _span(spot.center[0], reach, size[1]), _span(spot.center[1], reach, size[0])
    y, x = np.meshgrid(
        np.arange(*rows, dtype=np.float32) - np.float32(spot.center[1]),
        np.arange(*columns, dtype=np.float32) - np.float32(spot.center[0]),
        indexing="ij",
    )
    along, across = _turned(x, y, spot.tilt)
    radius = np.sqrt((along / spot.radii[0]) ** 2 + (across / spot.radii[1]) ** 2)
    inside = ((1 - radius) * min(spot.radii) + 0.5).clip(0, 1).astype(np.float32)
    return (slice(*rows), slice(*columns)), x, y, inside


def _pattern(name: str, spot: _Spot, x: _Array, y: _Array) -> _Array:
    """The share of the second colour, in [0, 1]."""
    x, y = _turned(x, y, spot.turn)
    wave = 2 * np.pi / spot.period
    first, second = spot.phases
    diagonal = wave / np.sqrt(2)
    match name:
        case "horizontal":
            field = np.sin(wave * y + first)
        case "vertical":
            field = np.sin(wave * x + first)
        case "rising":
            field = np.sin(diagonal * (x + y) + first)
        case "falling":
            field = np.sin(diagonal * (x - y) + first)
        case "checker":
            field = 2 * np.sin(wave / 1.5 * x + first) * np.sin(wave / 1.5 * y + second)
        case "rings":
            field = np.sin(wave * np.hypot(x, y) + first)
        case "dots":
            field = np.cos(wave * x + first) + np.cos(wave * y + second) - 0.3
        case "rays":
            field = np.sin(7 * np.arctan2(y, x) + first)
        case "plain":
            field = np.ones_like(x)
        case "halves":
            field = _turned(x, y, first)[0]
        case "gradient":
            field = _turned(x, y, first)[0] / (3 * max(spot.radii))
        case _:
            field = 8 * (_resized(spot.grid, (x.shape[0], x.shape[1])) - 0.5)
    share: _Array = (0.5 + 1.5 * field).clip(0, 1)
    return share


# --- tools ---------------------------------------------------------------------------------------


def _turned(x: _Array, y: _Array, angle: float) -> tuple[_Array, _Array]:
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * x + sine * y, cosine * y - sine * x


def _span(center: float, reach: float, side: int) -> tuple[int, int]:
    return max(int(center - reach), 0), min(int(center + reach) + 1, side)


def _colors(random: _Random, low: float, high: float) -> _Array:
    return random.uniform(low, high, (2, 3)).astype(np.float32)


def _mixed(colors: _Array, share: _Array) -> _Array:
    """(3, H, W): from the first colour at 0 to the second at 1."""
    first, second = colors[..., None, None]
    mixed: _Array = first + share * (second - first)
    return mixed


def _noise(random: _Random, size: tuple[int, ...], cells: tuple[float, float]) -> _Array:
    """Smooth noise in [0, 1] with about so many cells down and across a picture of the size."""
    down, across = (max(2, round(count)) for count in cells)
    return _resized(random.uniform(0, 1, (down, across)), (size[0], size[1]))


def _resized(grid: _Array, size: tuple[int, int]) -> _Array:
    from PIL import Image

    coarse = Image.fromarray((grid * 255).astype(np.uint8))
    smooth = coarse.resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(smooth) / np.float32(255)
