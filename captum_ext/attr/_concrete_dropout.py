"""Concrete dropout, and its simplification by Korsch et al. (2023).

Both draw z in (0, 1), near 1 with probability theta = sigmoid(logit), from the same uniform noise
u. They are the same function in exact arithmetic:

    z = sigmoid((log theta - log(1 - theta) + log u - log(1 - u)) / t)      (Eq. 5)
      = sigmoid((logit + log u - log(1 - u)) / t)                           (Eq. 8)

In floating point the first loses the logit where theta saturates. P(z > 1/2) = theta at any
temperature t, but E[z] = theta only in the limit of t = 0.
"""

import torch
from torch import Generator, Tensor

MACHINE_EPSILON = torch.finfo(torch.float64).eps  # of the published code, also in float32


def concrete_dropout(
    logits: Tensor, uniform: Tensor, temperature: float, eps: float = MACHINE_EPSILON
) -> Tensor:
    """Eq. 5, with `eps` in each logarithm, as in the published code."""
    theta = torch.sigmoid(logits)
    odds = torch.log(theta + eps) - torch.log(1 - theta + eps)
    noise = torch.log(uniform + eps) - torch.log(1 - uniform + eps)
    return torch.sigmoid((odds + noise) / temperature)


def simplified_concrete_dropout(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Eq. 8, which uses the logit directly."""
    noise = torch.log(uniform) - torch.log1p(-uniform)
    return torch.sigmoid((logits + noise) / temperature)


DROPOUTS = {"cd": concrete_dropout, "scd": simplified_concrete_dropout}


def draw_uniform_noise(shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
    """Uniform numbers in (0, 1): the logarithms of 0 and 1 - 1 would be infinite."""
    noise = torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)
    return noise.clamp_(2**-25, 1 - 2**-24)
