"""Pictures of beetles with a mark on the back, and of spots beside them, drawn with NumPy."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Random = np.random.RandomState

_NEUTRAL = ("plain", "halves", "gradient", "blotches")


def draw(random: Random, pattern: str | None, size: tuple[int, int]) -> tuple[Array, Array, Array]:
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


def _background(random: Random, size: tuple[int, int], unit: float) -> Array:
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

    center: Array
    axes: tuple[float, float]
    forward: Array
    side: float  # of the mirroring

    @property
    def frame(self) -> Array:
        """Rows: forward and sideways."""
        x, y = self.forward
        return np.array([[x, y], [-self.side * y, self.side * x]])

    def inside(self, random: Random, margin: float) -> Array:
        """A point of the back at least about `margin` from its edge."""
        angle, radius = random.uniform(0, 2 * np.pi), np.sqrt(random.uniform())
        long, short = (axis - margin for axis in self.axes)
        there = radius * np.array([long * np.cos(angle), short * np.sin(angle)])
        place: Array = self.center + there @ self.frame
        return place

    def reaches(self, point: Array, margin: float) -> bool:
        """Whether a point is nearer than about `margin` to the back or the head."""
        u, v = self.frame @ (point - self.center)
        long, short = (axis + margin for axis in self.axes)
        head = np.hypot(u - 1.05 * self.axes[0], v) < 0.55 * self.axes[1] + margin
        return bool((u / long) ** 2 + (v / short) ** 2 < 1 or head)


def _pose(random: Random, size: tuple[int, int], unit: float) -> _Pose:
    center = np.array([random.uniform(0.38, 0.62) * side for side in size[::-1]])
    axes = (random.uniform(56, 68) * unit, random.uniform(38, 46) * unit)
    angle = random.uniform(0, 2 * np.pi)
    return _Pose(center, axes, np.array([np.cos(angle), np.sin(angle)]), random.choice([-1.0, 1.0]))


def _beetle(random: Random, canvas: Array, pose: _Pose, unit: float) -> Array:
    """Draws legs, feelers, head and back; returns the mask of all of them."""
    from PIL import Image, ImageDraw

    _, *size = canvas.shape
    long, short = pose.axes
    skin, shell = _colors(random, 0.05, 0.35)[0], _colors(random, 0.2, 0.9)
    drawn = Image.new("L", (2 * size[1], 2 * size[0]))
    pen = ImageDraw.Draw(drawn)

    def at(points: Array) -> list[tuple[float, float]]:
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
    colors: Array
    period: float
    phases: Array
    turn: float
    grid: Array  # of the blotches
    pattern: str  # of a distractor
    center: Array


def _spot(random: Random, unit: float) -> _Spot:
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


def _spot_colors(random: Random) -> Array:
    """A dark and a light colour, of which one channel may be exchanged, in a random order."""
    colors = np.stack([random.uniform(0, 0.4, 3), random.uniform(0.6, 1, 3)])
    channel = random.randint(4)
    if channel < 3:
        colors[:, channel] = colors[::-1, channel]
    return colors[:: random.choice([-1, 1])].astype(np.float32)


def _settle(random: Random, spot: _Spot, pose: _Pose, size: tuple[int, int]) -> bool:
    """Looks for a place beside the beetle; twelve draws whatever they find."""
    reach = max(spot.radii)
    places = [
        np.array([random.uniform(reach, side - reach) for side in size[::-1]]) for _ in range(12)
    ]
    free = [place for place in places if not pose.reaches(place, reach + 2)]
    if free:
        spot.center = free[0]
    return bool(free)


def _cover(spot: _Spot, size: tuple[int, int]) -> Array:
    """The opacity of a spot, (H, W)."""
    cover = np.zeros(size, dtype=np.float32)
    window, _, _, inside = _patch(spot, size)
    cover[window] = inside
    return cover


def _paint(canvas: Array, spot: _Spot, pattern: str) -> None:
    window, x, y, inside = _patch(spot, (canvas.shape[1], canvas.shape[2]))
    color = _mixed(spot.colors, _pattern(pattern, spot, x, y))
    canvas[:, *window] += inside * (color - canvas[:, *window])


def _patch(spot: _Spot, size: tuple[int, int]) -> tuple[tuple[slice, slice], Array, Array, Array]:
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


def _pattern(name: str, spot: _Spot, x: Array, y: Array) -> Array:
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
    share: Array = (0.5 + 1.5 * field).clip(0, 1)
    return share


# --- tools ---------------------------------------------------------------------------------------


def _turned(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * x + sine * y, cosine * y - sine * x


def _span(center: float, reach: float, side: int) -> tuple[int, int]:
    return max(int(center - reach), 0), min(int(center + reach) + 1, side)


def _colors(random: Random, low: float, high: float) -> Array:
    return random.uniform(low, high, (2, 3)).astype(np.float32)


def _mixed(colors: Array, share: Array) -> Array:
    """(3, H, W): from the first colour at 0 to the second at 1."""
    first, second = colors[..., None, None]
    mixed: Array = first + share * (second - first)
    return mixed


def _noise(random: Random, size: tuple[int, ...], cells: tuple[float, float]) -> Array:
    """Smooth noise in [0, 1] with about so many cells down and across a picture of the size."""
    down, across = (max(2, round(count)) for count in cells)
    return _resized(random.uniform(0, 1, (down, across)), (size[0], size[1]))


def _resized(grid: Array, size: tuple[int, int]) -> Array:
    from PIL import Image

    coarse = Image.fromarray((grid * 255).astype(np.uint8))
    smooth = coarse.resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(smooth) / np.float32(255)
