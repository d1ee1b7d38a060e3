"""What an optimiser moves: an image's pixels, or its frequencies."""

from typing import Any

import torch
from torch import Tensor


class Pixels:
    """Images (B, C, *spatial) as they are."""

    def encode(self, images: Tensor) -> Tensor:
        """The images."""
        return images

    def decode(self, parameters: Tensor) -> Tensor:
        """A copy: what is moved has a gradient, and is nobody's image."""
        return parameters.clone()

    def gradient(self, of_images: Tensor) -> Tensor:
        """The gradient by the parameters, of that by the images."""
        return of_images


class Fourier:
    """Images (B, C, *spatial) by coefficients c of their frequencies f, weighted by 1 / |f|.

    The spectrum of an image is c / |f|, as that of photographs falls. A step of the same size in
    all coefficients then changes coarse structure most, and an optimiser that gives each number
    its own pace, as Adam does, gives it to a frequency and not to a pixel. |f| is at least one
    period over the longest side. The scale is such that coefficients with a mean square of 1 make
    images with a mean square of about 1.

    Args:
        images: their spatial size, dtype and device are meant.
    """

    def __init__(self, images: Tensor) -> None:
        self.size, self.dims = images.shape[2:], tuple(range(2, images.dim()))
        like: Any = {"dtype": images.dtype, "device": images.device}
        lines = [torch.fft.fftfreq(n, **like) for n in self.size[:-1]]
        lines.append(torch.fft.rfftfreq(self.size[-1], **like))
        squares = [line.square() for line in torch.meshgrid(*lines, indexing="ij")]
        weights = 1 / torch.stack(squares).sum(0).sqrt().clamp(min=1 / max(self.size))
        self.weights = weights / weights.square().mean().sqrt()

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) to real and imaginary parts, (B, C, *spectrum, 2)."""
        spectrum = torch.fft.rfftn(images, dim=self.dims, norm="ortho")
        return torch.view_as_real(spectrum / self.weights)

    def decode(self, parameters: Tensor) -> Tensor:
        """Back to images."""
        spectrum = torch.view_as_complex(parameters) * self.weights
        images: Tensor = torch.fft.irfftn(spectrum, self.size, self.dims, norm="ortho")
        return images

    def gradient(self, of_images: Tensor) -> Tensor:
        """The gradient by the parameters, of that by the images."""
        zeros = torch.zeros_like(self.encode(of_images)).requires_grad_()
        (found,) = torch.autograd.grad(self.decode(zeros), zeros, of_images)
        return found
