"""Concrete dropout, and what Korsch et al. (2023) simplified it to.

Both draw z in (0, 1), near 1 with probability theta = sigmoid(logit), of the same uniform noise u,
and are the same function in exact arithmetic:

    z = sigmoid((log theta - log(1 - theta) + log u - log(1 - u)) / t)      (Eq. 5)
      = sigmoid((logit + log u - log(1 - u)) / t)                           (Eq. 8)

In floating point the first loses the logit where theta saturates. P(z > 1/2) = theta at any
temperature t, but E[z] = theta only as t goes to 0.
"""

import torch
from torch import Generator, Tensor

MACHINE_EPSILON = torch.finfo(torch.float64).eps  # the published code's, in float32 too


def concrete_dropout(
    logits: Tensor, uniform: Tensor, temperature: float, eps: float = MACHINE_EPSILON
) -> Tensor:
    """Eq. 5, with `eps` in each logarithm, as it is published."""
    theta = torch.sigmoid(logits)
    odds = torch.log(theta + eps) - torch.log(1 - theta + eps)
    noise = torch.log(uniform + eps) - torch.log(1 - uniform + eps)
    return torch.sigmoid((odds + noise) / temperature)


def simplified_concrete_dropout(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Eq. 8: the logit as it is."""
    noise = torch.log(uniform) - torch.log1p(-uniform)
    return torch.sigmoid((logits + noise) / temperature)


DROPOUTS = {"cd": concrete_dropout, "scd": simplified_concrete_dropout}


def draw_uniform(shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
    """Uniform numbers, kept off 0 and 1, whose logarithms are infinite."""
    noise = torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)
    return noise.clamp_(2**-25, 1 - 2**-24)
