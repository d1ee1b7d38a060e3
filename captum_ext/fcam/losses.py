"""What teaches an F-CAM decoder: seeds and size, and in `crf` colour (F-CAM, Sec. 3; Eq. 3).

Each loss is a function, and a module that keeps its settings. All add up in float32 or better.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_ext._checks import check_size
from captum_ext._engine.precision import full_precision
from captum_ext.fcam.seeding import IGNORED

# --- seeds ---------------------------------------------------------------------------------------


def partial_cross_entropy(logits: Tensor, seeds: Tensor) -> Tensor:
    """The mean of -log softmax(logits)[seed] over the labelled pixels of the whole batch.

    What is ignored has no part in value or gradient. Without any label the loss is 0.

    Args:
        logits: (N, K, H, W).
        seeds: (N, H, W), int64, classes in [0, K) or -255.

    Returns:
        A scalar.

    Example:
        >>> seeds = torch.tensor([[[1, -255]]])
        >>> partial_cross_entropy(torch.zeros(1, 2, 1, 2), seeds)
        tensor(0.6931)
    """
    total = F.cross_entropy(full_precision(logits), seeds, ignore_index=IGNORED, reduction="sum")
    return total / (seeds != IGNORED).sum().clamp(min=1)


# --- size ----------------------------------------------------------------------------------------


def log_barrier(z: Tensor, t: float | Tensor) -> Tensor:
    r"""The log-barrier extension of the constraint z <= 0 (Kervadec et al. 2019).

    .. math::
        \psi_t(z) = \begin{cases} -\frac1t \log(-z) & z \le -1/t^2 \\
            tz - \frac1t \log\frac1{t^2} + \frac1t & \text{else} \end{cases}

    Value and slope are continuous at -1/t^2.

    Args:
        z: of any shape.
        t: greater than 0; the larger, the nearer to a step.

    Reference:
        Kervadec et al., "Constrained Deep Networks: Lagrangian Optimization via Log-Barrier
        Extensions", https://arxiv.org/abs/1904.04205

    Example:
        >>> log_barrier(torch.tensor([-100.0, 3.0]), 10.0)
        tensor([-0.4605, 30.5605])
    """
    t = torch.as_tensor(t, dtype=z.dtype, device=z.device)
    joint = -1 / t**2
    holds = z <= joint
    inside = -torch.log(-torch.where(holds, z, joint)) / t
    outside = t * z - torch.log(-joint) / t + 1 / t
    return torch.where(holds, inside, outside)


def size_loss(probabilities: Tensor, t: float | Tensor = 1.0) -> Tensor:
    r"""Both regions shall be large: 1/2 sum_r mean_n psi_t(-a_nr), a = sum of the pixels of S_nr.

    Areas are sums over pixels, not means: the barrier's logarithm, which makes the gradient
    independent of the image's size, needs them beyond 1.

    Args:
        probabilities: S, (N, 2, H, W): softmax of the decoder's logits.
        t: of the barrier.

    Returns:
        A scalar.

    Example:
        >>> size_loss(torch.full((1, 2, 10, 20), 0.5))  # -log 100
        tensor(-4.6052)
    """
    areas = full_precision(probabilities).flatten(2).sum(2)
    return log_barrier(-areas, t).mean(0).sum() / 2


class SizeLoss(nn.Module):
    """`size_loss` with its schedule: t is 1 at first, and 1.01 times as large after each epoch.

    `t` is a buffer, and so part of a checkpoint.

    Args:
        t: at the start.
        growth: the factor of `step`. 1.01 (official code).
        t_max: the largest t. 10 (official code).

    Raises:
        ValueError: a number that is not above 0; a `t_max` below `t`.

    Example:
        >>> loss = SizeLoss()
        >>> loss.step()
        >>> loss.t
        tensor(1.0100)
    """

    t: Tensor

    def __init__(self, t: float = 1.0, growth: float = 1.01, t_max: float = 10.0) -> None:
        super().__init__()
        for name, value in (("t", t), ("growth", growth), ("t_max", t_max)):
            check_size(name, value, positive=True)
        if t_max < t:
            raise ValueError(f"`t_max` must be at least `t`, got {t_max} and {t}.")
        self.start, self.growth, self.t_max = t, growth, t_max
        self.register_buffer("t", torch.tensor(float(t)))

    def extra_repr(self) -> str:
        return f"t={self.start}, growth={self.growth}, t_max={self.t_max}"

    def forward(self, probabilities: Tensor) -> Tensor:
        return size_loss(probabilities, self.t)

    def step(self) -> None:
        """After each epoch."""
        self.t.mul_(self.growth).clamp_(max=self.t_max)
