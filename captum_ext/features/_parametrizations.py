"""Parametrisations of images, which an optimiser moves: by pixels, or by frequencies."""

from typing import Any

import torch
from torch import Tensor


class Pixels:
    """Images (B, C, *spatial) as parameters, without a change."""

    def encode(self, images: Tensor) -> Tensor:
        """The images."""
        return images

    def decode(self, parameters: Tensor) -> Tensor:
        """A copy, since the optimiser writes to the parameters."""
        return parameters.clone()

    def gradient(self, of_images: Tensor) -> Tensor:
        """The gradient with respect to the parameters, from the one with respect to the images."""
        return of_images


class Fourier:
    """Images (B, C, *spatial) as coefficients c of their frequencies f, weighted by 1 / |f|.

    The spectrum of an image is c / |f|, which falls like that of photographs. A step of the same
    size in all coefficients changes coarse structure most. An optimiser with a step size for each
    parameter, such as Adam, has one for each frequency, instead of one for each pixel. |f| is at
    least one period over the longest side. Coefficients with a mean square of 1 make images with a
    mean square of about 1.

    Args:
        images: example images, for their spatial size, dtype and device.
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
        """The gradient with respect to the parameters, from the one with respect to the images."""
        zeros = torch.zeros_like(self.encode(of_images)).requires_grad_()
        (gradient,) = torch.autograd.grad(self.decode(zeros), zeros, of_images)
        return gradient
