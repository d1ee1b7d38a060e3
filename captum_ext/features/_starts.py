"""Where an ascent starts: images, random numbers, and what pictures they are of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Module

from captum_ext._engine.precision import full_precision


def checked_start(start: Any, target: Any, module: Module | None) -> tuple[Tensor, torch.dtype]:
    """The images at the start, in float32 or better, and the dtype that the model takes.

    Args:
        start: images, or the shape of one.
        target: what is asked for: one image or a shape is repeated for a list of targets.
        module: whose parameters tell device and dtype.
    """
    weights = () if module is None else module.parameters()
    weight = next((w for w in weights if w.is_floating_point()), None)
    n_targets = len(target) if isinstance(target, list) else 1
    if isinstance(target, Tensor) and target.dim() == 1:
        n_targets = len(target)
    if isinstance(start, Tensor):
        if not start.is_floating_point() or not 3 <= start.dim() <= 5 or not start.numel():
            raise ValueError(
                f"`start` must be images (B, C, *spatial) of floats with one to three spatial "
                f"dimensions, got {tuple(start.shape)}, {start.dtype}."
            )
        if not bool(torch.isfinite(start).all()):
            raise ValueError("`start` is not finite.")
        kind = start.dtype if weight is None else weight.dtype
        repeats = n_targets if len(start) == 1 else 1
        images = start.detach().repeat(max(repeats, 1), *[1] * (start.dim() - 1))
    else:
        shape = _shape(start)
        kind = torch.float32 if weight is None else weight.dtype
        device = None if weight is None else weight.device
        images = torch.zeros(max(n_targets, 1), *shape, dtype=kind, device=device)
    return full_precision(images), kind


class Drawn:
    """Random numbers for all images of a batch alike."""

    def __init__(self, images: Tensor, generator: Generator | None) -> None:
        self.images = images
        self.options: Any = {"generator": generator, "device": images.device}

    def normal(self) -> Tensor:
        """Of the shape of one image."""
        return torch.randn(self.images.shape[1:], dtype=self.images.dtype, **self.options)

    def shifts(self, n_steps: int, most: int) -> list[list[int]]:
        """One for each step and spatial dimension."""
        shape = (n_steps, self.images.dim() - 2)
        found: list[list[int]] = torch.randint(-most, most + 1, shape, **self.options).tolist()
        return found

    def seed(self) -> int:
        """For random numbers that take no generator."""
        return int(torch.randint(2**62, (1,), **self.options).item())


def _shape(start: Any) -> tuple[int, ...]:
    shape = tuple(start) if isinstance(start, Sequence) and not isinstance(start, str) else ()
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    if not whole or not 2 <= len(shape) <= 4:
        raise ValueError(
            f"`start` must be images or the shape of one, (C, *spatial) with one to three spatial "
            f"dimensions, got {start!r}."
        )
    return shape


def channels(normalize: tuple[Tensor, Tensor] | None, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, to go with the images; 0 and 1 where they are not known."""
    values = torch.tensor([[0.0], [1.0]]) if normalize is None else torch.stack(normalize)
    if values.shape[1] not in (1, images.shape[1]):
        raise ValueError(
            f"`normalize` is of {values.shape[1]} channels, and the images have {images.shape[1]}."
        )
    mean, std = values.to(images).reshape(2, -1, *[1] * (images.dim() - 2))
    return mean, std


def pictures(images: Tensor, normalize: tuple[Tensor, Tensor] | None) -> Tensor:
    """The images in [0, 1]."""
    if normalize is None:
        most = images.flatten(1).abs().amax(1).reshape(-1, *[1] * (images.dim() - 1))
        return 0.5 + images / torch.where(most == 0, 1, 2 * most)
    mean, std = channels(normalize, images)
    return (images * std + mean).clamp(0, 1)
