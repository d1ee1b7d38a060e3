"""Pillow's modes: pictures of any mode in RGB, and masks of any mode as exact truth values."""

from typing import Any

import numpy as np
from PIL import Image

from captum_ext._checks import warn

Array = np.ndarray[Any, Any]

WHITE_16_BIT = 65535
_STRETCHED = (
    "A picture has floats outside [0, 1], or integers that are not of 16 bits. It is stretched "
    "from its own minimum and maximum to 0 and 255, so that equal values of two pictures may "
    "become different ones. Scale floats to [0, 1] and integers to 0 to 65535 to prevent that."
)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB with 8 bits.

    Equal values become equal bytes in all pictures: integers of more than 8 bits are divided by
    65535, and floats are taken for shares of white. Only integers that are not from 0 to 65535, and
    floats that are not in [0, 1], are stretched from the picture's own minimum and maximum, with a
    warning. Transparent pixels are blended with white.

    Raises:
        ValueError: floats that are not finite; a mode that Pillow cannot convert.
    """
    if _is_deep(image):
        image = Image.fromarray(_to_8_bits(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_mask(image: Image.Image, above: float = 0.0) -> Array:
    """Mark the pixels of a mask whose value is above a share of white, (H, W), bool.

    The comparison is exact: with `above` 0, each value greater than 0 counts, however small it is.
    Of colours, the largest of the three values counts. Alpha is ignored.

    Raises:
        ValueError: floats that are not finite.
    """
    if _is_deep(image):
        values = _finite_values(image)
        white = _white(values) or values.max()
    else:
        values, white = np.asarray(image.convert("RGB")).max(2), 255
    mask: Array = values > above * white
    return mask


def _is_deep(image: Image.Image) -> bool:
    """Return whether a picture has integers of more than 8 bits, or floats."""
    return image.mode.startswith(("I", "F"))


def _finite_values(image: Image.Image) -> Array:
    values = np.asarray(image)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("the picture has values that are not finite.")
    return values


def _white(values: Array) -> int | None:
    """The value of white that all pictures share; None where values are beyond it."""
    white = 1 if values.dtype.kind == "f" else WHITE_16_BIT
    return white if values.min() >= 0 and values.max() <= white else None


def _to_8_bits(image: Image.Image) -> Array:
    values = _finite_values(image)
    grey: Array
    if _white(values) is None:
        warn(_STRETCHED)
        low, high = float(values.min()), float(values.max())
        grey = np.round(255 * (values.astype(np.float64) - low) / ((high - low) or 1))
    elif values.dtype.kind == "f":
        grey = np.round(255 * values)
    else:
        grey = (values.astype(np.int32) + 128) // 257  # 65535 is 255 x 257
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey = np.where(values == clear, 255, grey)
    return grey.astype(np.uint8)
