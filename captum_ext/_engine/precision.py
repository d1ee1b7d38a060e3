"""The range and precision of floats: halves, squares, and gradients too small for float16."""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from captum_ext._errors import ArgumentError

_LOSS_SCALE = 1024  # the gradient at one pixel underflows in float16


def full_precision(tensor: Tensor) -> Tensor:
    """Convert float16 and bfloat16 to float32; return other tensors unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def divide_by_power(x: Tensor, least: int = -126) -> tuple[Tensor, Tensor]:
    """Divide each example by a power of two, so that its squares are in the range of floats.

    The division is exact, unless values vanish beside the largest one.

    Args:
        x: (B, ...), float32 or better.
        least: the least exponent. With 0, small values stay as they are.

    Returns:
        The example divided by its power, with a largest value between 1/2 and 1 (if it is no
        denormal number), and the powers, (B, 1, ...). Examples of zeros stay as they are.
    """
    largest = x.detach().abs().flatten(1).amax(1).reshape(-1, *[1] * (x.dim() - 1))
    # torch.ldexp depends on torch's default dtype and device before torch 2.7.
    power = largest / torch.frexp(largest).mantissa
    power = power.masked_fill(~power.isfinite(), 1).clamp(2.0**least, 2.0**126)
    return x / power, power


def headroom(low: Tensor, high: Tensor) -> Tensor:
    """A factor with which high - low does not overflow: 1, or 1/2 where it would."""
    return 1 - torch.isinf(high - low).to(low) / 2


def twice_square(sigma: float) -> float:
    """2 sigma^2, the denominator of a Gaussian: greater than 0, and infinite if it overflows."""
    return max(2 * sigma * sigma, sys.float_info.min)


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """A context manager that switches autocast off on the device of `tensor`."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def gradient_of_sum(scores: Tensor, leaf: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the sum of the scores with respect to `leaf`.

    If the model computes in float16, the sum is multiplied by 1024 before the backward pass, and
    the gradient is divided by 1024 afterwards. If the gradient overflows, the backward pass is
    repeated without this factor.

    Args:
        scores: any shape.
        leaf: a tensor that requires a gradient.
        dtype: the dtype of the model's inputs.

    Raises:
        ValueError: the scores do not depend on `leaf`.
    """
    device = leaf.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    scale = _LOSS_SCALE if torch.float16 in (dtype, autocast) else 1
    gradient: Tensor | None = None
    if scores.requires_grad:
        total, is_scaled = scores.sum(), scale > 1
        (gradient,) = torch.autograd.grad(
            total * scale, leaf, allow_unused=True, retain_graph=is_scaled
        )
        if is_scaled and gradient is not None and not bool(torch.isfinite(gradient).all()):
            scale = 1
            (gradient,) = torch.autograd.grad(total, leaf)
    if gradient is None:
        raise ArgumentError(
            "`forward_func` gives scores that have no gradient with respect to its input.",
            "forward_func",
        )
    return gradient / scale
