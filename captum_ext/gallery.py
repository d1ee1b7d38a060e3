"""Pictures of maps, laid over the image that they explain."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

Array = np.ndarray[Any, Any]

_COLOURS = "inferno"  # perceptually uniform, and readable in grey


def overlay(view: Array, attribution: Tensor) -> Array:
    """The positive part of a map in colour, as bright as the image.

    Args:
        view: the image, (H, W, 3) in [0, 1].
        attribution: the raw map, (H, W).

    Returns:
        (H, W, 3) in [0, 1].
    """
    from matplotlib import colormaps

    positive = attribution.detach().float().clamp(min=0).cpu().numpy()
    heat = (positive / (positive.max() or 1))[..., None]
    colour = colormaps[_COLOURS](heat[..., 0])[..., :3]
    grey = (view @ np.array([0.299, 0.587, 0.114]))[..., None]
    blended: Array = colour * (0.4 + 0.6 * grey) + 0.3 * grey * (1 - heat)
    return blended.clip(0, 1)


def gallery(
    image: "Image", maps: Mapping[str, Tensor], title: str = "", subtitle: str = ""
) -> "Figure":
    """A figure with a panel for the image and one for each map, laid over the image.

    Args:
        image: the image that the network sees.
        maps: raw maps (H, W) of the image's size, by their panels' titles. The positive part of
            each is shown, scaled to its own maximum.
        title: one line above the panels.
        subtitle: a smaller line below the title.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    from captum_ext._data.modes import to_rgb

    view = np.asarray(to_rgb(image)) / 255
    panels = {"Image": view, **{name: overlay(view, m) for name, m in maps.items()}}
    columns = _columns(len(panels))
    side, gap, caption, head = 2.0, 0.1, 0.28, 0.72  # inches
    tall = side * view.shape[0] / view.shape[1]
    width = gap + columns * (side + gap)
    height = head + -(-len(panels) // columns) * (tall + caption) + gap
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")

    def add_axes_at(left: float, top: float, w: float, h: float) -> "Axes":
        box = (left / width, 1 - (top + h) / height, w / width, h / height)
        return figure.add_axes(box)

    for i, (name, panel) in enumerate(panels.items()):
        row, column = divmod(i, columns)
        top = head + row * (tall + caption) + caption
        axes = add_axes_at(gap + column * (side + gap), top, side, tall)
        axes.imshow(panel, interpolation="bicubic")
        axes.set_title(name, fontsize=9.5, pad=4)
        axes.set_axis_off()
    for text, top, size, color in ((title, 0.13, 15, "black"), (subtitle, 0.46, 10, "0.35")):
        figure.text(gap / width, 1 - top / height, text, va="top", fontsize=size, color=color)
    if columns >= 4:
        bar = add_axes_at(width - gap - side, 0.2, side, 0.12)
        figure.colorbar(ScalarMappable(cmap=_COLOURS), bar, orientation="horizontal", ticks=[])
        for x, align, text in ((0, "left", "0"), (0.5, "center", "map"), (1, "right", "max")):
            bar.text(x, -0.35, text, ha=align, va="top", fontsize=8.5, transform=bar.transAxes)
    return figure


def _columns(panels: int) -> int:
    """The number of columns, 3 to 5, with the fewest empty panels; of several, the largest."""
    if panels <= 5:
        return panels
    return min((5, 4, 3), key=lambda columns: math.ceil(panels / columns) * columns - panels)
