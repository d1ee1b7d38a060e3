"""Infill: the pixels that replace the hidden part of an image.

Methods that perturb take it as `baselines`. Some infills are made once from the images, others
depend on the mask or are drawn again at each step; `Infill` serves all of them. All values are in
the space of the model's inputs: no mean or standard deviation of a data set is assumed.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from captum_ext._engine.precision import full_precision, headroom, without_autocast
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._repr import options_repr
from captum_ext.imaging import blur

SIGMA = 10.0  # of the blur, in pixels of an image whose shorter side is SIDE
LOCAL_SIDE = 15  # of the neighbourhood of "local", in pixels of the same image
SIDE = 224

FromImages = Callable[[Tensor], Tensor]
FromMasks = Callable[[Tensor, Tensor], Tensor]
Baselines = None | float | str | Tensor | FromImages | FromMasks | tuple[Any, ...]


# --- named infills -------------------------------------------------------------------------------


def gaussian(images: Tensor, sigma: float | None = None, kernel_size: int | None = None) -> Tensor:
    """Images under a Gaussian blur, in full precision.

    Args:
        images: (N, C, H, W).
        sigma: standard deviation in pixels. None is 10 for images whose shorter side has 224
            pixels, and in proportion for others.
        kernel_size: odd, in pixels. None covers 3.2 standard deviations on each side.

    Returns:
        A tensor of the images' shape and dtype.

    Raises:
        ValueError: an even or negative `kernel_size`.

    Example:
        >>> gaussian(torch.tensor([[[[0.0, 1.0, 0.0]]]]), sigma=0.5, kernel_size=3)
        tensor([[[[0.2130, 0.7870, 0.2130]]]])
    """
    if sigma is None:
        sigma = SIGMA * min(images.shape[2:]) / SIDE
    if kernel_size is None:
        kernel_size = 2 * math.ceil(3.2 * sigma) + 1
    return blur(full_precision(images), kernel_size, sigma).to(images.dtype)


def channel_means(images: Tensor) -> Tensor:
    """The mean of each channel over each image: (N, C, 1, 1) for images (N, C, H, W).

    Example:
        >>> channel_means(torch.tensor([[[[1.0, 3.0]]]]))
        tensor([[[[2.]]]])
    """
    return full_precision(images).mean((2, 3), keepdim=True).to(images.dtype)


def local_mean(images: Tensor, keep: Tensor) -> Tensor:
    """The mean of the kept pixels around each pixel; 0 where none is kept.

    Args:
        images: (N, C, H, W).
        keep: masks (N, 1, H, W); pixels with more than 1/2 are kept.

    Returns:
        A tensor of the images' shape and dtype. Means are over squares of 15 x 15 pixels for images
        whose shorter side has 224 pixels, and in proportion for others.

    Example:
        >>> images = torch.arange(32.0).expand(1, 1, 32, 32)
        >>> local_mean(images, torch.ones(1, 1, 32, 32))[0, 0, 0, :3]
        tensor([0.5000, 1.0000, 2.0000])
    """
    from kornia.filters import box_blur

    side = 2 * round((LOCAL_SIDE // 2) * min(images.shape[2:]) / SIDE) + 1
    is_kept = (keep > 0.5).to(full_precision(images))
    with without_autocast(is_kept):
        both = torch.cat((full_precision(images) * is_kept, is_kept), 1)
        mean = box_blur(both, (side, side), "constant", separable=True)
    share = mean[:, -1:]
    # A separable filter rounds: a share of less than half a pixel stands for no pixel.
    return torch.where(share * side**2 > 0.5, mean[:, :-1] / share, 0).to(images.dtype)


IMAGE_INFILLS: dict[str, FromImages] = {
    "blur": gaussian,
    "mean": channel_means,
    "zeros": torch.zeros_like,
}
MASK_INFILLS: dict[str, FromMasks] = {"local": local_mean}
NAMES = (*IMAGE_INFILLS, *MASK_INFILLS, "noise")


def blend(x: Tensor, baseline: Tensor | float, masks: Tensor) -> Tensor:
    """The inputs under masks, x m + b (1 - m), mask by mask.

    Args:
        x: (B, C, *spatial).
        baseline: b, a number or a tensor that broadcasts to x.
        masks: m, (n, 1 or B, 1, *spatial), in [0, 1] and of the dtype of x.

    Returns:
        (n * B, C, *spatial).

    Example:
        >>> blend(torch.tensor([[[1.0, 2.0]]]), 5.0, torch.tensor([[[[1.0, 0.0]]]]))
        tensor([[[1., 5.]]])
    """
    if not isinstance(baseline, Tensor) and baseline == 0:
        return (x * masks).flatten(0, 1)
    # A number that is copied to the device would make each pass wait for it.
    fill = baseline.to(x) if isinstance(baseline, Tensor) else x.new_full((), baseline)
    return torch.lerp(fill, x, masks).flatten(0, 1)


# --- any infill ----------------------------------------------------------------------------------


class Infill:
    """The infill of `images` (N, C, H, W).

    Args:
        images: floats.
        baselines: one of

            - None or "blur": a Gaussian blur, see `gaussian`;
            - a number; 0 (or "zeros") is the data set's mean colour in normalised images;
            - a tensor that broadcasts to the images;
            - "mean": each channel's mean over the image;
            - "local": the mean of the kept pixels around each pixel, see `local_mean`;
            - "noise": a colour, uniform between the channels' smallest and largest values in the
              image, plus Gaussian noise of a fifth of that range in each pixel, clipped to that
              range. It is drawn again at each step, with the same draw for all images;
            - a callable of the images, which is called once;
            - a callable of images (n, C, H, W) and masks (n, 1, H, W), 1 where the image is kept,
              which is called for every batch of masks. Both callables give the images' shape. No
              gradient passes through them.

    Raises:
        ValueError: an unknown name; a number, a tensor or a callable's result that does not fit or
            is not finite.
        TypeError: `baselines` of another type.

    Example:
        >>> images = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
        >>> Infill(images, "mean")(slice(0, 1), torch.ones(1, 1, 1, 2, 2))
        tensor([[[[[3., 3.],
                   [3., 3.]]]]])
    """

    def __init__(self, images: Tensor, baselines: Baselines = None) -> None:
        if isinstance(baselines, tuple):
            if len(baselines) != 1:
                raise ArgumentError(
                    f"`baselines` must be a single infill, got a tuple of {len(baselines)}."
                )
            baselines = baselines[0]
        self.images, self.baselines = images, baselines
        self.fixed: Tensor | None = None
        self.of_masks: FromMasks | None = None
        self.noise: Tensor | None = None  # in [0, 1], after `draw`
        self.is_noise = False
        self.is_checked = False
        if baselines is None:
            baselines = "blur"
        if isinstance(baselines, str):
            if baselines not in NAMES:
                raise ArgumentError(f"`baselines` must be one of {NAMES}, got {baselines!r}.")
            self.is_noise = baselines == "noise"
            self.of_masks = MASK_INFILLS.get(baselines)
            baselines = IMAGE_INFILLS.get(baselines)
        if isinstance(baselines, int | float | Tensor) and not isinstance(baselines, bool):
            self.fixed = self._expand(
                torch.as_tensor(baselines, dtype=images.dtype, device=images.device)
            )
        elif callable(baselines) and _needs_masks(baselines):
            self.of_masks = cast(FromMasks, baselines)
        elif callable(baselines):
            with torch.no_grad():
                self.fixed = self._expand(cast(FromImages, baselines)(images.clone()))
        elif baselines is not None:
            raise ArgumentTypeError(
                f"`baselines` must be None, a number, a tensor, one of {NAMES} or a callable, got "
                f"{type(baselines)}."
            )

    def __repr__(self) -> str:
        return options_repr(self)

    def draw(self, generator: Generator | None) -> None:
        """Draw the noise of the next step, if the infill is noise."""
        if self.is_noise:
            _, channels, height, width = self.images.shape
            like = full_precision(self.images).new_empty
            colour = like(channels, 1, 1).uniform_(generator=generator)
            grain = like(channels, height, width).normal_(generator=generator)
            self.noise = (colour + 0.2 * grain).clamp(0, 1)

    @torch.no_grad()
    def __call__(self, examples: slice | Tensor, keep: Tensor) -> Tensor:
        """The infill of n images under p masks each.

        Args:
            examples: the images, as a slice or as indices (n,).
            keep: masks (n, p, 1, H, W), 1 where the image is kept.

        Returns:
            (n, 1, C, H, W), or (n, p, C, H, W) if the infill depends on the masks.

        Raises:
            ValueError: a callable's result of another shape, or that is not finite.
        """
        if self.fixed is not None:
            return self.fixed[examples, None]
        images = self.images[examples]
        if self.noise is not None:
            low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
            room = headroom(low, high)
            low, high = low * room, high * room
            return ((low + (high - low) * self.noise.to(images)) / room)[:, None]
        assert self.of_masks is not None
        repeated = images.repeat_interleave(keep.shape[1], 0)
        filled = self.of_masks(repeated, keep.flatten(0, 1).clone())
        if not isinstance(filled, Tensor) or filled.shape != repeated.shape:
            got = tuple(filled.shape) if isinstance(filled, Tensor) else type(filled)
            raise ArgumentError(
                f"`baselines` must give images of shape {tuple(repeated.shape)}, got {got}."
            )
        if not self.is_checked:  # only once, because the check synchronises with the device
            self.is_checked = True
            _check_finite(filled)
        infill: Tensor = filled.to(images).unflatten(0, keep.shape[:2])
        return infill

    def _expand(self, fill: Any) -> Tensor:
        """The infill in the images' shape, checked."""
        shape = self.images.shape
        try:
            expanded: Tensor = fill.detach().to(self.images).expand(shape)
        except (AttributeError, RuntimeError):
            got = tuple(fill.shape) if isinstance(fill, Tensor) else type(fill)
            raise ArgumentError(
                f"`baselines` must broadcast to the images {tuple(shape)}, got {got}."
            ) from None
        _check_finite(expanded)
        return expanded


def _check_finite(fill: Tensor) -> None:
    if not bool(torch.isfinite(fill).all()):
        raise ArgumentError("`baselines` are not finite in the dtype of the images.")


def _needs_masks(function: Callable[..., Any]) -> bool:
    """Return whether `function` needs a second argument, the masks."""
    try:
        called = function.forward if isinstance(function, nn.Module) else function
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # builtins have no signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) > 1
