"""Reading picture files, upright and in RGB."""

import errno
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image, ImageOps

from captum_ext._checks import first_line
from captum_ext._data.modes import to_rgb

MAX_PIXELS = 50_000_000
# The formats that are decoded. Pillow knows others, and starts Ghostscript for one of them.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
# Errors that Pillow raises for files that are missing, damaged, too large or no pictures.
UNREADABLE = (OSError, SyntaxError, struct.error, Image.DecompressionBombError)
_T = TypeVar("_T")


def is_resource_error(error: BaseException) -> bool:
    """Return whether an error is about memory, open files or CUDA, and not about a picture."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    message = str(error) if isinstance(error, RuntimeError) else ""
    return any(words in message for words in ("CUDA error", "DefaultCPUAllocator", "out of memory"))


def read_stored(path: str | Path) -> Image.Image:
    """Read a picture of any mode in RGB (see `to_rgb`), without turning it.

    Raises:
        OSError: as `read_picture` does.
    """
    return read_picture(path, to_rgb)


def read_upright(path: str | Path) -> Image.Image:
    """Read a picture of any mode, upright and in RGB (see `to_rgb`).

    Raises:
        OSError: as `read_picture` does.
    """
    if not Path(path).is_file():
        raise OSError(f"the image {str(path)!r} does not exist or is not a file")
    return read_picture(path, lambda image: to_rgb(ImageOps.exif_transpose(image)))


def read_picture(path: str | Path, convert: Callable[[Image.Image], _T]) -> _T:
    """Open a picture, check its size, and decode and convert it.

    Raises:
        OSError: the file is missing, is in none of the `FORMATS`, cannot be read or has more than
            50 megapixels. (The size is checked before decoding.)
    """
    Image.init()
    try:
        # Positional, as in all of Pillow's versions.
        with Image.open(path, "r", [name for name in FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return convert(image)
    except MemoryError:
        raise
    except Exception as error:  # broken files raise many types, like SyntaxError, struct.error
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise OSError(unreadable_message(path, error)) from error


def unreadable_message(path: str | Path, error: BaseException) -> str:
    """The error message for a file that is no picture, or too large."""
    # Pillow's warning of large pictures is an exception under some filters.
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        size = f"{MAX_PIXELS // 10**6} megapixels"
        return f"the image {str(path)!r} is larger than {size}: make it smaller"
    return (
        f"{str(path)!r} cannot be read as an image ({first_line(error)}): give one of the formats "
        f"{', '.join(FORMATS)}"
    )
