"""Pixels in memory: tensors of bytes, resizing, and the normalisation of model inputs."""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from kornia.color import rgb_to_grayscale
from PIL import Image
from torch import Tensor

from captum_ext._data.modes import to_rgb
from captum_ext._errors import ArgumentError

IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def to_byte_tensor(picture: Any) -> Tensor:
    """Convert a PIL image, or a tensor of bytes or of floats in [0, 1], to bytes (3, H, W).

    PIL images may have any mode; see `to_rgb`.
    """
    if isinstance(picture, Tensor):
        if picture.dim() != 3 or picture.shape[0] not in (1, 3):
            raise ValueError(f"tensors must be (3, H, W) or (1, H, W), got {tuple(picture.shape)}.")
        if picture.is_floating_point():
            if not bool(((picture >= 0) & (picture <= 1)).all()):
                raise ValueError("floats must be in [0, 1]: pictures are normalised here.")
            picture = (255 * picture).round()
        elif picture.dtype != torch.uint8:
            raise ValueError(f"tensors must be of bytes or of floats, got {picture.dtype}.")
        expanded: Tensor = picture.to(torch.uint8).expand(3, -1, -1)
        return expanded
    if not isinstance(picture, Image.Image):
        raise TypeError(f"pictures must be PIL images or tensors, got {type(picture)}.")
    pixels: Tensor = torch.from_numpy(np.array(to_rgb(picture)))
    return pixels.permute(2, 0, 1)


def resize_pixels(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize pixels (C, H, W), with antialiasing."""
    if tuple(pixels.shape[1:]) == size:
        return pixels.contiguous()
    from torchvision.transforms.v2.functional import resize

    resized: Tensor = resize(pixels, list(size), antialias=True)
    return resized


def mean_and_std(normalize: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of each channel, two tensors (C,).

    Args:
        normalize: (mean, std), or an object with the attributes `mean` and `std`.
        dtype: the dtype of the tensors.

    Raises:
        ValueError: `normalize` is neither, or a standard deviation is not positive.
    """
    if not isinstance(normalize, Iterable) and hasattr(normalize, "mean"):
        normalize = (normalize.mean, getattr(normalize, "std", None))
    try:
        mean, std = (
            torch.as_tensor(values, dtype=dtype, device="cpu").clone() for values in normalize
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"`normalize` must be (mean, std), got {normalize!r}.", "normalize"
        ) from error
    if mean.dim() != 1 or mean.shape != std.shape or not mean.numel() or not bool((std > 0).all()):
        raise ArgumentError(
            f"`normalize` must be means and standard deviations, greater than 0, one for each "
            f"channel, got {normalize!r}.",
            "normalize",
        )
    return mean, std


class Normalize:
    """Normalises pictures in [0, 1] to the inputs of a model, and back.

    Args:
        normalize: (mean, std) with one entry for each of the model's channels, 3 or 1; or an object
            with the attributes `mean` and `std`.

    Attributes:
        mean: (C, 1, 1), float32.
        std: (C, 1, 1), float32.

    Raises:
        ValueError: `normalize` is neither, or not for 3 channels or 1.
    """

    def __init__(self, normalize: Any) -> None:
        mean, std = mean_and_std(normalize)
        if len(mean) not in (1, 3):
            raise ArgumentError(
                f"`normalize` must be of three channels or of one, got {normalize!r}.", "normalize"
            )
        self.mean, self.std = mean.reshape(-1, 1, 1), std.reshape(-1, 1, 1)

    def to(self, device: torch.device) -> Self:
        """Move mean and standard deviation to a device, and return the object."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @property
    def channels(self) -> int:
        """The number of channels of the model's inputs, 3 or 1."""
        return len(self.mean)

    def to_lists(self) -> list[list[float]]:
        """[mean, std] as lists, for files."""
        return [self.mean.flatten().tolist(), self.std.flatten().tolist()]

    def grey(self, pictures: Tensor) -> Tensor:
        """Convert pictures (..., C, H, W) to grey if the model takes one channel."""
        return rgb_to_grayscale(pictures) if self.channels == 1 < pictures.shape[-3] else pictures

    def __call__(self, pictures: Tensor) -> Tensor:
        """Normalise pictures (..., C, H, W) in [0, 1]."""
        return (self.grey(pictures) - self.mean.to(pictures)) / self.std.to(pictures)

    def inverse(self, images: Tensor) -> Tensor:
        """Convert model inputs back to pictures, clipped to [0, 1]."""
        return (images * self.std.to(images) + self.mean.to(images)).clamp(0, 1)
