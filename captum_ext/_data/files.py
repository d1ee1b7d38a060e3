"""Reading picture files, upright and in RGB."""

import errno
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from captum_ext._checks import first_line

MAX_PIXELS = 50_000_000
# Errors that Pillow raises for files that are missing, damaged, too large or no pictures.
UNREADABLE = (OSError, SyntaxError, struct.error, Image.DecompressionBombError)


def is_resource_error(error: BaseException) -> bool:
    """Return whether an error is about memory, open files or CUDA, and not about a picture."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    message = str(error) if isinstance(error, RuntimeError) else ""
    return any(words in message for words in ("CUDA error", "DefaultCPUAllocator", "out of memory"))


def read_stored(path: str | Path, mode: str) -> Image.Image:
    """Read a picture without rotation, and convert it to one of Pillow's modes.

    Raises:
        OSError: the file cannot be read.
    """
    return _read(
        path,
        lambda image: image.convert(mode),
        lambda error: f"{path} cannot be read as an image: {error}",
    )


def read_upright(path: str | Path) -> Image.Image:
    """Read a picture of any mode, upright and in RGB.

    Transparent pixels are blended with white. 16-bit values are reduced to 8 bits. Other integers
    and floats are stretched from their minimum and maximum to 0 and 255.

    Raises:
        OSError: the file is missing, cannot be read or has more than 50 megapixels. (The size is
            checked before decoding.)
    """
    if not Path(path).is_file():
        raise OSError(f"the image {str(path)!r} does not exist or is not a file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _read(path, _to_upright_rgb, lambda error: unreadable_message(path, error))


def unreadable_message(path: str | Path, error: BaseException) -> str:
    """The error message for a file that is no picture, or too large."""
    if isinstance(error, Image.DecompressionBombError):
        size = f"{MAX_PIXELS // 10**6} megapixels"
        return f"the image {str(path)!r} is larger than {size}: make it smaller"
    return (
        f"{str(path)!r} cannot be read as an image ({first_line(error)}): give a PNG, a JPEG or "
        f"another format that Pillow knows"
    )


def _read(
    path: str | Path,
    convert: Callable[[Image.Image], Image.Image],
    describe: Callable[[Exception], str],
) -> Image.Image:
    """Open a picture and convert it; errors become an OSError with the message of `describe`."""
    try:
        with Image.open(path) as image:
            return convert(image)
    except MemoryError:
        raise
    except Exception as error:  # broken files raise many types, like SyntaxError, struct.error
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise OSError(describe(error)) from error


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        upright = Image.fromarray(_to_8_bits(upright))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright)
    return upright.convert("RGB")


def _to_8_bits(image: Image.Image) -> np.ndarray[Any, Any]:
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    low, high = values.min(), values.max()
    if not image.mode.startswith("F") and low >= 0 and high <= 65535:
        low, high = 0, 65535  # 16-bit greys have the mode "I;16" or, from some formats, "I"
    grey: np.ndarray[Any, Any] = np.round(255 * (values - low) / ((high - low) or 1))
    return grey.astype(np.uint8)
