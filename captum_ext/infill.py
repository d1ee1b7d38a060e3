"""Infill: what shows where a mask hides an image.

Methods that perturb take it as `baselines`. Some infills are made once of the images, others depend
on the mask or are drawn anew at each step; `Infill` hides the difference. Everything happens in the
space of the model's inputs: no mean or standard deviation of a data set is assumed.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from captum_ext._engine.precision import full_precision, without_autocast
from captum_ext.imaging import blur

SIGMA = 10.0  # of the blur, in pixels of an image whose shorter side is SIDE
LOCAL = 15  # the side of the neighbourhood of "local", of the same image
SIDE = 224

FromImages = Callable[[Tensor], Tensor]
FromMasks = Callable[[Tensor, Tensor], Tensor]
Baselines = None | float | str | Tensor | FromImages | FromMasks | tuple[Any, ...]


# --- by name -------------------------------------------------------------------------------------


def gaussian(images: Tensor, sigma: float | None = None, kernel_size: int | None = None) -> Tensor:
    """`images` blurred in full precision; by 10 pixels where their shorter side has 224."""
    if sigma is None:
        sigma = SIGMA * min(images.shape[2:]) / SIDE
    if kernel_size is None:
        kernel_size = 2 * math.ceil(3.2 * sigma) + 1
    return blur(full_precision(images), kernel_size, sigma).to(images.dtype)


def channel_means(images: Tensor) -> Tensor:
    """Each channel's mean over the image."""
    return full_precision(images).mean((2, 3), keepdim=True).to(images.dtype)


def local_mean(images: Tensor, keep: Tensor) -> Tensor:
    """The mean of the kept pixels around each pixel; 0 where none is kept."""
    from kornia.filters import box_blur

    side = 2 * round((LOCAL // 2) * min(images.shape[2:]) / SIDE) + 1
    kept = (keep > 0.5).to(full_precision(images))
    with without_autocast(kept):
        both = torch.cat((full_precision(images) * kept, kept), 1)
        mean = box_blur(both, (side, side), "constant", separable=True)
    share = mean[:, -1:]
    # Sums of a separable filter are off by rounding: less than half a pixel is none.
    return torch.where(share * side**2 > 0.5, mean[:, :-1] / share, 0).to(images.dtype)


OF_IMAGES: dict[str, FromImages] = {
    "blur": gaussian,
    "mean": channel_means,
    "zeros": torch.zeros_like,
}
OF_MASKS: dict[str, FromMasks] = {"local": local_mean}
NAMES = (*OF_IMAGES, *OF_MASKS, "noise")


# --- any -----------------------------------------------------------------------------------------


class Infill:
    """The infill of `images` (N, C, H, W).

    Args:
        images: floats.
        baselines: one of

            - None or "blur": a Gaussian blur with a standard deviation of 10 pixels for 224 (the
              shorter side), by Kornia;
            - a number, which "zeros" is too; in normalised images 0 is the data set's mean colour;
            - a tensor that broadcasts to the images;
            - "mean": each channel's mean over the image;
            - "local": the mean of the pixels that the mask keeps (more than half) among the 15 x 15
              (for 224) around; 0 where it keeps none;
            - "noise": a colour, uniform between the channels' smallest and largest values in the
              image, plus Gaussian noise of a fifth of that range in each pixel, cut off at its
              ends; drawn anew at each step, the same draw for all images;
            - a callable of the images, called once, or one that needs two arguments, images
              (n, C, H, W) and masks (n, 1, H, W), 1 where the image is kept, called for all that
              the model sees. It gives the images' shape. No gradient passes through it.

    Raises:
        ValueError: an unknown name; a number, a tensor or a callable's result that does not fit or
            is not finite.
        TypeError: none of these.

    Example:
        >>> images = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
        >>> Infill(images, "mean")(slice(0, 1), torch.ones(1, 1, 1, 2, 2))
        tensor([[[[[3., 3.],
                   [3., 3.]]]]])
    """

    def __init__(self, images: Tensor, baselines: Baselines = None) -> None:
        if isinstance(baselines, tuple):
            if len(baselines) != 1:
                raise ValueError(f"`baselines` must be one for the images, got {len(baselines)}.")
            baselines = baselines[0]
        self.images = images
        self.fixed: Tensor | None = None
        self.of_masks: FromMasks | None = None
        self.noise: Tensor | None = None  # in [0, 1], once it is drawn
        self.is_noise = False
        self.checked = False
        if baselines is None:
            baselines = "blur"
        if isinstance(baselines, str):
            if baselines not in NAMES:
                raise ValueError(f"`baselines` must be one of {NAMES}, got {baselines!r}.")
            self.is_noise = baselines == "noise"
            self.of_masks = OF_MASKS.get(baselines)
            baselines = OF_IMAGES.get(baselines)
        if isinstance(baselines, int | float | Tensor) and not isinstance(baselines, bool):
            self.fixed = self._checked(
                torch.as_tensor(baselines, dtype=images.dtype, device=images.device)
            )
        elif callable(baselines) and _needs_two(baselines):
            self.of_masks = cast(FromMasks, baselines)
        elif callable(baselines):
            with torch.no_grad():
                self.fixed = self._checked(cast(FromImages, baselines)(images.clone()))
        elif baselines is not None:
            raise TypeError(
                f"`baselines` must be None, a number, a tensor, one of {NAMES} or a callable, got "
                f"{type(baselines)}."
            )

    def draw(self, generator: Generator | None) -> None:
        """Draw what is drawn anew at each step."""
        if self.is_noise:
            _, channels, height, width = self.images.shape
            like = full_precision(self.images).new_empty
            colour = like(channels, 1, 1).uniform_(generator=generator)
            grain = like(channels, height, width).normal_(generator=generator)
            self.noise = (colour + 0.2 * grain).clamp(0, 1)

    @torch.no_grad()
    def __call__(self, examples: slice | Tensor, keep: Tensor) -> Tensor:
        """The infill of some images, for masks (n, p, 1, H, W): (n, p or 1, C, H, W).

        Args:
            examples: which images; a slice, or indices (n,).
            keep: 1 where the image is kept.
        """
        if self.fixed is not None:
            return self.fixed[examples, None]
        images = self.images[examples]
        if self.noise is not None:
            low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
            return (low + (high - low) * self.noise.to(images))[:, None]
        assert self.of_masks is not None
        repeated = images.repeat_interleave(keep.shape[1], 0)
        filled = self.of_masks(repeated, keep.flatten(0, 1).clone())
        if not isinstance(filled, Tensor) or filled.shape != repeated.shape:
            shown = tuple(filled.shape) if isinstance(filled, Tensor) else type(filled)
            raise ValueError(
                f"`baselines` must give images of shape {tuple(repeated.shape)}, got {shown}."
            )
        if not self.checked:  # the first time only: it waits for the device
            self.checked = True
            _check_finite(filled)
        found: Tensor = filled.to(images).unflatten(0, keep.shape[:2])
        return found

    def _checked(self, fill: Any) -> Tensor:
        """The infill in the images' shape."""
        shape = self.images.shape
        try:
            expanded: Tensor = fill.detach().to(self.images).expand(shape)
        except (AttributeError, RuntimeError):
            shown = tuple(fill.shape) if isinstance(fill, Tensor) else type(fill)
            raise ValueError(
                f"`baselines` must broadcast to the images {tuple(shape)}, got {shown}."
            ) from None
        _check_finite(expanded)
        return expanded


def _check_finite(fill: Tensor) -> None:
    if not bool(torch.isfinite(fill).all()):
        raise ValueError("`baselines` are not finite, in the images' number format.")


def _needs_two(function: Callable[..., Any]) -> bool:
    """Whether `function` cannot be called without a second argument, the masks."""
    try:
        called = function.forward if isinstance(function, nn.Module) else function
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # builtins have no signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) > 1
