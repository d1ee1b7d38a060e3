"""The start of an ascent: images and random numbers; and images as pictures to look at."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Module

from captum_ext._engine.precision import full_precision
from captum_ext._errors import ArgumentError


def start_images(start: Any, target: Any, module: Module | None) -> tuple[Tensor, torch.dtype]:
    """The images at the start, in float32 or float64, and the model's own dtype.

    Args:
        start: images (B, C, *spatial), or the shape of one image.
        target: the targets. A single image, or a shape, is repeated for each target of a list.
        module: the module whose parameters have the device and the dtype.

    Raises:
        ValueError: `start` is neither images nor a shape, or is not finite.
    """
    weights = () if module is None else module.parameters()
    weight = next((w for w in weights if w.is_floating_point()), None)
    n_targets = len(target) if isinstance(target, list) else 1
    if isinstance(target, Tensor) and target.dim() == 1:
        n_targets = len(target)
    if isinstance(start, Tensor):
        if not start.is_floating_point() or not 3 <= start.dim() <= 5 or not start.numel():
            raise ArgumentError(
                f"`start` must be images (B, C, *spatial) of floats with one to three spatial "
                f"dimensions, got {tuple(start.shape)}, {start.dtype}.",
                "start",
            )
        if not bool(torch.isfinite(start).all()):
            raise ArgumentError("`start` is not finite.", "start")
        dtype = start.dtype if weight is None else weight.dtype
        repeats = n_targets if len(start) == 1 else 1
        images = start.detach().repeat(max(repeats, 1), *[1] * (start.dim() - 1))
    else:
        shape = _checked_shape(start)
        dtype = torch.float32 if weight is None else weight.dtype
        device = None if weight is None else weight.device
        images = torch.zeros(max(n_targets, 1), *shape, dtype=dtype, device=device)
    return full_precision(images), dtype


class SharedRandom:
    """Random numbers that all images of a batch share.

    Args:
        images: the batch, for its shape, dtype and device.
        generator: the generator. None takes torch's global one.
    """

    def __init__(self, images: Tensor, generator: Generator | None) -> None:
        self.images = images
        self.options: Any = {"generator": generator, "device": images.device}

    def normal(self) -> Tensor:
        """Normal numbers in the shape of one image."""
        return torch.randn(self.images.shape[1:], dtype=self.images.dtype, **self.options)

    def shifts(self, n_steps: int, most: int) -> list[list[int]]:
        """A shift of at most `most` pixels for each step and spatial dimension."""
        shape = (n_steps, self.images.dim() - 2)
        shifts: list[list[int]] = torch.randint(-most, most + 1, shape, **self.options).tolist()
        return shifts

    def seed(self) -> int:
        """A seed for functions that take no generator."""
        return int(torch.randint(2**62, (1,), **self.options).item())


def _checked_shape(start: Any) -> tuple[int, ...]:
    shape = tuple(start) if isinstance(start, Sequence) and not isinstance(start, str) else ()
    are_sizes = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    if not are_sizes or not 2 <= len(shape) <= 4:
        raise ArgumentError(
            f"`start` must be images or the shape of one, (C, *spatial) with one to three spatial "
            f"dimensions, got {start!r}.",
            "start",
        )
    return shape


def broadcast_mean_std(
    normalize: tuple[Tensor, Tensor] | None, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in shapes that broadcast with the images; 0 and 1 for None.

    Raises:
        ValueError: the images have another number of channels.
    """
    values = images.new_tensor([[0.0], [1.0]]) if normalize is None else torch.stack(normalize)
    if values.shape[1] not in (1, images.shape[1]):
        raise ArgumentError(
            f"`normalize` is of {values.shape[1]} channels, and the images have {images.shape[1]}.",
            "normalize",
        )
    mean, std = values.to(images).reshape(2, -1, *[1] * (images.dim() - 2))
    return mean, std


def to_pictures(images: Tensor, normalize: tuple[Tensor, Tensor] | None) -> Tensor:
    """Images as pictures in [0, 1]: denormalised, or scaled around mid-grey without `normalize`."""
    if normalize is None:
        most = images.flatten(1).abs().amax(1).reshape(-1, *[1] * (images.dim() - 1))
        return 0.5 + images / torch.where(most == 0, 1, 2 * most)
    mean, std = broadcast_mean_std(normalize, images)
    return (images * std + mean).clamp(0, 1)
