"""Pictures of beetles with a mark on the back and spots beside them, painted with NumPy.

Canvases are (3, H, W), float32, in [0, 1]. `unit` is the length of a pixel of a picture of 224.
"""

from dataclasses import dataclass

import numpy as np

from captum_ext.datasets._seeded import Array, Random

_DISTRACTOR_PATTERNS = ("plain", "halves", "gradient", "blotches")


def render_beetle(
    random: Random, pattern: str | None, size: tuple[int, int]
) -> tuple[Array, Array, Array]:
    """Pixels (H, W, 3) in uint8, the mask of the mark and the mask of the beetle.

    Args:
        random: its draws do not depend on the pattern.
        pattern: the pattern of the mark; None leaves the mark out.
        size: (H, W).
    """
    unit = min(size) / 224
    canvas = _background(random, size, unit)
    pose = _random_pose(random, size, unit)
    mark = _random_spot(random, unit)
    mark.center = pose.random_point(random, max(mark.radii) + 2 * unit)
    distractors = [_random_spot(random, unit) for _ in range(random.randint(4))]
    for spot in distractors:
        if _move_beside_beetle(random, spot, pose, size):
            _paint_spot(canvas, spot, spot.pattern)
    body = _paint_beetle(random, canvas, pose, unit)
    part = _opacity(mark, size)
    if pattern is not None:
        _paint_spot(canvas, mark, pattern)
    canvas *= 255
    pixels = np.rint(canvas, out=canvas).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)), part > 0, body


def _background(random: Random, size: tuple[int, int], unit: float) -> Array:
    """A canvas of soft noise, a coarse grating, or grass."""
    choice = random.randint(3)
    colors = _random_colors(random, 0.15, 0.85)
    if choice == 0:
        cells = random.uniform(6, 24)
        texture = _smooth_noise(random, size, (cells, cells))
    elif choice == 1:
        angle, period = random.uniform(0, np.pi), random.uniform(28, 70) * unit
        y, x = (2 * np.pi / period * np.arange(side, dtype=np.float32) for side in size)
        phase = random.uniform(0, 2 * np.pi)
        wave = np.exp(1j * (np.sin(angle) * y + phase))[:, None] * np.exp(1j * np.cos(angle) * x)
        texture = 0.5 + 0.5 * wave.imag.astype(np.float32)
    else:
        long, short = random.uniform(3, 7), random.uniform(40, 80)
        grid = (long, short) if random.randint(2) else (short, long)
        texture = _smooth_noise(random, size, grid)
    fine = _smooth_noise(random, size, (56, 56))
    texture = 0.75 * texture + 0.25 * fine
    return _blend(colors, texture)


@dataclass
class _Pose:
    """The ellipse of a beetle's back.

    Attributes:
        center: (x, y).
        axes: the half axes, along the body and across.
        forward: the unit vector to the head.
        side: 1, or -1 for a mirrored beetle.
    """

    center: Array
    axes: tuple[float, float]
    forward: Array
    side: float

    @property
    def frame(self) -> Array:
        """The unit vectors forward and sideways, as rows."""
        x, y = self.forward
        return np.array([[x, y], [-self.side * y, self.side * x]])

    def random_point(self, random: Random, margin: float) -> Array:
        """A point of the back at least about `margin` from its edge."""
        angle, radius = random.uniform(0, 2 * np.pi), np.sqrt(random.uniform())
        long, short = (axis - margin for axis in self.axes)
        offset = radius * np.array([long * np.cos(angle), short * np.sin(angle)])
        point: Array = self.center + offset @ self.frame
        return point

    def is_near(self, point: Array, margin: float) -> bool:
        """Return whether a point is nearer than about `margin` to the back or the head."""
        u, v = self.frame @ (point - self.center)
        long, short = (axis + margin for axis in self.axes)
        near_head = np.hypot(u - 1.05 * self.axes[0], v) < 0.55 * self.axes[1] + margin
        return bool((u / long) ** 2 + (v / short) ** 2 < 1 or near_head)


def _random_pose(random: Random, size: tuple[int, int], unit: float) -> _Pose:
    center = np.array([random.uniform(0.38, 0.62) * side for side in size[::-1]])
    axes = (random.uniform(56, 68) * unit, random.uniform(38, 46) * unit)
    angle = random.uniform(0, 2 * np.pi)
    return _Pose(center, axes, np.array([np.cos(angle), np.sin(angle)]), random.choice([-1.0, 1.0]))


def _paint_beetle(random: Random, canvas: Array, pose: _Pose, unit: float) -> Array:
    """Paint legs, feelers, head and back, and return the mask of the beetle."""
    from PIL import Image, ImageDraw

    _, *size = canvas.shape
    long, short = pose.axes
    skin, shell = _random_colors(random, 0.05, 0.35)[0], _random_colors(random, 0.2, 0.9)
    image = Image.new("L", (2 * size[1], 2 * size[0]))  # at twice the size, for soft edges
    pen = ImageDraw.Draw(image)

    def to_image(points: Array) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in 2 * (pose.center + points @ pose.frame)]

    for side in (-1, 1):
        for leg, swing in zip((0.55, 0.0, -0.5), random.uniform(-0.2, 0.2, 3), strict=True):
            hip = np.array([leg * long, side * 0.8 * short])
            knee = hip + short * np.array([0.5 * leg + swing, side * 0.5])
            foot = knee + short * np.array([0.6 * leg - 0.2 + swing, side * 0.3])
            pen.line(to_image(np.stack([hip, knee, foot])), 255, round(10 * unit), joint="curve")
        bend = random.uniform(-0.15, 0.15)
        feeler = np.array([[1.2, 0.1 * side], [1.45, 0.25 * side + bend], [1.6, 0.3 * side + bend]])
        pen.line(to_image(feeler * [long, short]), 255, round(6 * unit), joint="curve")
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    pen.polygon(to_image(circle * 0.5 * short + [1.05 * long, 0]), 255)
    opacity = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BOX)) / np.float32(255)
    canvas += opacity * (skin[:, None, None] - canvas)

    (x, y), reach = pose.center, long + 2
    columns, rows = _clipped_range(x, reach, size[1]), _clipped_range(y, reach, size[0])
    dx, dy = np.arange(*columns) - x, (np.arange(*rows) - y)[:, None]
    u, v = ((dx * a + dy * b).astype(np.float32) for a, b in pose.frame)
    radius = np.hypot(u / long, v / short)
    back = ((1 - radius) * short + 0.5).clip(0, 1)
    seam = 0.5 + 0.5 * (np.abs(v) / (1.5 * unit)).clip(0, 1)
    cells = random.uniform(4, 8)
    window = (..., slice(*rows), slice(*columns))
    light = (1 - 0.45 * radius * radius) * seam
    color = _blend(shell, _smooth_noise(random, radius.shape, (cells, cells))) * light
    canvas[window] += back * (color - canvas[window])
    opacity[window] = np.maximum(opacity[window], back)
    return opacity >= 0.5


# --- marks and distractors -----------------------------------------------------------------------


@dataclass
class _Spot:
    """An ellipse filled with a pattern of two colours.

    Attributes:
        radii: the half axes.
        tilt: the angle of the ellipse.
        colors: (2, 3).
        period: the length of a period of the pattern.
        phases: (2,): the phases of the pattern.
        pattern_tilt: the angle of the pattern.
        grid: (4, 4): the grey values of "blotches".
        pattern: the pattern of a distractor.
        center: (x, y).
    """

    radii: tuple[float, float]
    tilt: float
    colors: Array
    period: float
    phases: Array
    pattern_tilt: float
    grid: Array
    pattern: str
    center: Array


def _random_spot(random: Random, unit: float) -> _Spot:
    radii = (random.uniform(15, 23) * unit, random.uniform(15, 23) * unit)
    return _Spot(
        radii,
        tilt=random.uniform(0, np.pi),
        colors=_random_spot_colors(random),
        period=random.uniform(8, 12) * unit,
        phases=random.uniform(0, 2 * np.pi, 2),
        pattern_tilt=random.uniform(-0.15, 0.15),
        grid=random.uniform(0, 1, (4, 4)),
        pattern=_DISTRACTOR_PATTERNS[random.randint(len(_DISTRACTOR_PATTERNS))],
        center=np.zeros(2),
    )


def _random_spot_colors(random: Random) -> Array:
    """A dark and a light colour in random order, which may have exchanged one channel."""
    colors = np.stack([random.uniform(0, 0.4, 3), random.uniform(0.6, 1, 3)])
    channel = random.randint(4)
    if channel < 3:
        colors[:, channel] = colors[::-1, channel]
    return colors[:: random.choice([-1, 1])].astype(np.float32)


def _move_beside_beetle(random: Random, spot: _Spot, pose: _Pose, size: tuple[int, int]) -> bool:
    """Centre a spot beside the beetle, and return whether one of twelve random points was free."""
    reach = max(spot.radii)
    centers = [
        np.array([random.uniform(reach, side - reach) for side in size[::-1]]) for _ in range(12)
    ]
    free = [center for center in centers if not pose.is_near(center, reach + 2)]
    if free:
        spot.center = free[0]
    return bool(free)


def _opacity(spot: _Spot, size: tuple[int, int]) -> Array:
    """The opacity of a spot, (H, W)."""
    opacity = np.zeros(size, dtype=np.float32)
    window, _, _, inside = _spot_window(spot, size)
    opacity[window] = inside
    return opacity


def _paint_spot(canvas: Array, spot: _Spot, pattern: str) -> None:
    window, x, y, inside = _spot_window(spot, (canvas.shape[1], canvas.shape[2]))
    color = _blend(spot.colors, _pattern_share(pattern, spot, x, y))
    canvas[:, *window] += inside * (color - canvas[:, *window])


def _spot_window(
    spot: _Spot, size: tuple[int, int]
) -> tuple[tuple[slice, slice], Array, Array, Array]:
    """The window around a spot, and in it x and y from the spot's centre, and the opacity."""
    (x, y), reach = spot.center, max(spot.radii) + 2
    columns, rows = _clipped_range(x, reach, size[1]), _clipped_range(y, reach, size[0])
    dy, dx = np.meshgrid(
        np.arange(*rows, dtype=np.float32) - np.float32(y),
        np.arange(*columns, dtype=np.float32) - np.float32(x),
        indexing="ij",
    )
    along, across = _rotate(dx, dy, spot.tilt)
    radius = np.sqrt((along / spot.radii[0]) ** 2 + (across / spot.radii[1]) ** 2)
    inside = ((1 - radius) * min(spot.radii) + 0.5).clip(0, 1).astype(np.float32)
    return (slice(*rows), slice(*columns)), dx, dy, inside


def _pattern_share(name: str, spot: _Spot, x: Array, y: Array) -> Array:
    """The share of the second colour in a pattern, in [0, 1]."""
    x, y = _rotate(x, y, spot.pattern_tilt)
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
            field = _rotate(x, y, first)[0]
        case "gradient":
            field = _rotate(x, y, first)[0] / (3 * max(spot.radii))
        case _:  # "blotches"
            field = 8 * (_upsample(spot.grid, (x.shape[0], x.shape[1])) - 0.5)
    share: Array = (0.5 + 1.5 * field).clip(0, 1)
    return share


# --- geometry and colours ------------------------------------------------------------------------


def _rotate(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """Coordinates along axes that are rotated by an angle."""
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * x + sine * y, cosine * y - sine * x


def _clipped_range(center: float, reach: float, side: int) -> tuple[int, int]:
    """Start and stop of the pixels within reach of a centre, inside the picture."""
    return max(int(center - reach), 0), min(int(center + reach) + 1, side)


def _random_colors(random: Random, low: float, high: float) -> Array:
    """Two colours, (2, 3)."""
    return random.uniform(low, high, (2, 3)).astype(np.float32)


def _blend(colors: Array, share: Array) -> Array:
    """Blend two colours by the share (H, W) of the second: (3, H, W)."""
    first, second = colors[..., None, None]
    blend: Array = first + share * (second - first)
    return blend


def _smooth_noise(random: Random, size: tuple[int, ...], cells: tuple[float, float]) -> Array:
    """Smooth noise in [0, 1], with about `cells` extrema down and across the picture."""
    down, across = (max(2, round(count)) for count in cells)
    return _upsample(random.uniform(0, 1, (down, across)), (size[0], size[1]))


def _upsample(grid: Array, size: tuple[int, int]) -> Array:
    """Upsample a grid in [0, 1] to (H, W), by bicubic interpolation of bytes."""
    from PIL import Image

    coarse = Image.fromarray((grid * 255).astype(np.uint8))
    smooth = coarse.resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(smooth) / np.float32(255)
