"""Half precision: where sums are accumulated, and gradients that would vanish in it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_LOSS_SCALE = 1024  # fp16 has no numbers for one pixel's share of a gradient


def full_precision(tensor: Tensor) -> Tensor:
    """`tensor` in float32 where it has half precision, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast, if it is on, leaves computations on `tensor` alone."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def gradient_of_sum(scores: Tensor, leaf: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the sum of the scores with respect to `leaf`.

    Where the model computes in fp16, the scores are scaled by 1024 on the way back, and the
    gradient is divided by it. The pass is repeated without the scale where that overflows.

    Args:
        scores: the scores.
        leaf: a tensor that requires a gradient.
        dtype: the dtype of the model's inputs.

    Raises:
        ValueError: scores that do not depend on `leaf`.
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
        raise ValueError(
            "`forward_func` gives scores that have no gradient with respect to its input."
        )
    return gradient / scale
