"""Losses of an F-CAM decoder on seeds and size (F-CAM, Sec. 3, Eq. 3); `crf` has that on colour.

All sums are in float32 or float64.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_ext._checks import check_positive
from captum_ext._engine.precision import full_precision
from captum_ext._errors import ArgumentError
from captum_ext.fcam.seeding import IGNORED

# --- seeds ---------------------------------------------------------------------------------------


def partial_cross_entropy(logits: Tensor, seeds: Tensor) -> Tensor:
    r"""Cross-entropy at the seeds: the mean over all labelled pixels of the batch.

    .. math:: L = -\frac{1}{|\Omega|} \sum_{p \in \Omega} \log \operatorname{softmax}(z_p)_{y_p}

    with the seeds y at the labelled pixels :math:`\Omega`. (Eq. 3 of F-CAM has the sum, its code
    the mean.) Ignored pixels affect neither value nor gradient. Without seeds the loss is 0.

    Args:
        logits: z, (N, K, H, W).
        seeds: y, (N, H, W), int64: classes in [0, K), or -255 for ignored pixels.

    Returns:
        A scalar.

    Raises:
        IndexError: a seed is neither a class nor -255.

    Example:
        >>> seeds = torch.tensor([[[1, -255]]])
        >>> partial_cross_entropy(torch.zeros(1, 2, 1, 2), seeds)
        tensor(0.6931)
    """
    total = F.cross_entropy(full_precision(logits), seeds, ignore_index=IGNORED, reduction="sum")
    return total / (seeds != IGNORED).sum().clamp(min=1)


# --- size ----------------------------------------------------------------------------------------


def log_barrier(z: Tensor, t: float | Tensor) -> Tensor:
    r"""The log-barrier extension, a smooth penalty for the constraint z <= 0.

    .. math::
        \psi_t(z) = \begin{cases} -\frac1t \log(-z) & z \le -1/t^2 \\
            tz - \frac1t \log\frac1{t^2} + \frac1t & \text{else} \end{cases}

    Value and slope are continuous at -1/t^2.

    Args:
        z: a tensor of any shape.
        t: the sharpness, greater than 0. As t grows, the penalty comes near to a step.

    Returns:
        The penalty of each element, in the shape of `z`.

    Reference:
        Kervadec et al., "Constrained Deep Networks: Lagrangian Optimization via Log-Barrier
        Extensions", https://arxiv.org/abs/1904.04205

    Example:
        >>> log_barrier(torch.tensor([-100.0, 3.0]), 10.0)
        tensor([-0.4605, 30.5605])
    """
    t = torch.as_tensor(t, dtype=z.dtype, device=z.device)
    joint = -1 / t**2
    is_log = z <= joint
    logarithm = -torch.log(-torch.where(is_log, z, joint)) / t
    line = t * z - torch.log(-joint) / t + 1 / t
    return torch.where(is_log, logarithm, line)


def size_loss(probabilities: Tensor, t: float | Tensor = 1.0) -> Tensor:
    r"""The size loss: background and foreground shall both be large.

    .. math:: L = \frac12 \sum_{r=0}^1 \frac1N \sum_n \psi_t(-a_{nr}), \quad
        a_{nr} = \sum_p S_{nr}(p)

    with the log barrier psi and the areas a of both regions (F-CAM's Eq. 3, with the factors of its
    official code). Areas are sums over pixels, not means: above 1 the barrier is a logarithm, whose
    gradient does not depend on the image's size.

    Args:
        probabilities: S, (N, 2, H, W): the softmax of the decoder's logits.
        t: the sharpness of the barrier. 1 (official code, at the start).

    Returns:
        A scalar.

    Example:
        >>> size_loss(torch.full((1, 2, 10, 20), 0.5))  # -log 100
        tensor(-4.6052)
    """
    areas = full_precision(probabilities).flatten(2).sum(2)
    return log_barrier(-areas, t).mean(0).sum() / 2


class SizeLoss(nn.Module):
    """`size_loss` with a schedule: `step` multiplies t by `growth` after each epoch.

    `t` is a buffer, and so part of a checkpoint.

    Args:
        t: the sharpness of the barrier in the first epoch. 1 (official code).
        growth: the factor of each `step`. 1.01 (official code).
        t_max: the upper bound of t. 10 (official code).

    Raises:
        ValueError: a number is not positive, or `t_max` is below `t`.

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
            check_positive(name, value)
        if t_max < t:
            raise ArgumentError(f"`t_max` must be at least `t`, got {t_max} and {t}.", "t_max")
        self.start, self.growth, self.t_max = t, growth, t_max
        self.register_buffer("t", torch.tensor(float(t)))

    def extra_repr(self) -> str:
        return f"t={self.start}, growth={self.growth}, t_max={self.t_max}"

    def forward(self, probabilities: Tensor) -> Tensor:
        return size_loss(probabilities, self.t)

    def step(self) -> None:
        """Sharpen the barrier, after an epoch."""
        self.t.mul_(self.growth).clamp_(max=self.t_max)
