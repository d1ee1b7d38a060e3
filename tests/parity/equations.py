"""The papers' equations in float64, written out one by one and independently of the package.

A are the activations (B, K, h, w) of a layer, g the gradients of the score there, both as plain
autograd gives them. Maps are (B, h, w), signed: the ReLU of the papers comes after.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Scores = Callable[[Tensor], Tensor]  # of a batch of inputs, or of activations: (n,)


def grad_cam(a: Tensor, g: Tensor) -> Tensor:
    """Selvaraju et al. 2017, eqs. 1 and 2."""
    a, g = a.double(), g.double()
    return torch.einsum("bk,bkij->bij", g.mean((2, 3)), a)


def grad_cam_plus_plus_weights(a: Tensor, g: Tensor) -> Tensor:
    """Chattopadhay et al. 2018, eqs. 5 and 19: g^3 stands outside of the sum of A."""
    a, g = a.double(), g.double()
    sum_a = a.sum((2, 3), keepdim=True)
    alpha = torch.where(g == 0, 0, g**2 / (2 * g**2 + sum_a * g**3))
    return (alpha * g.clamp(min=0)).sum((2, 3))


def grad_cam_plus_plus(a: Tensor, g: Tensor) -> Tensor:
    """Chattopadhay et al. 2018, eq. 7."""
    return torch.einsum("bk,bkij->bij", grad_cam_plus_plus_weights(a, g), a.double())


def x_grad_cam(a: Tensor, g: Tensor) -> Tensor:
    """Fu et al. 2020, eq. 8; a channel that sums to 0 has no weight."""
    a, g = a.double(), g.double()
    sum_a = a.sum((2, 3), keepdim=True)
    w = torch.where(sum_a == 0, 0, g * a / sum_a).sum((2, 3))
    return torch.einsum("bk,bkij->bij", w, a)


def layer_cam(a: Tensor, g: Tensor) -> Tensor:
    """Jiang et al. 2021, eqs. 5 and 6."""
    return (g.double().clamp(min=0) * a.double()).sum(1)


def hires_cam(a: Tensor, g: Tensor) -> Tensor:
    """Draelos and Carin 2020, eq. 6."""
    return (g.double() * a.double()).sum(1)


def eigen_cam(a: Tensor, center: bool = False) -> Tensor:
    """Muhammad and Yeasin 2020, eqs. 2 and 3, up to sign: A v_1. The paper does not centre A."""
    cells = a.double().flatten(2).mT
    if center:
        cells = cells - cells.mean(1, keepdim=True)
    _, _, vt = torch.linalg.svd(cells, full_matrices=False)
    return (cells @ vt[:, 0, :, None]).reshape(len(a), *a.shape[2:])


def score_cam_weights(
    score: Scores, x: Tensor, a: Tensor, align_corners: bool = False, scale_first: bool = False
) -> Tensor:
    """Wang et al. 2020, algorithm 1: softmax over the channels of S(x * s(Up(A_k))) - S(0).

    Args:
        score: of inputs (n, 3, H, W) that all belong to one example.
        x: (3, H, W), one example.
        a: (K, h, w), its activations.
        align_corners: of the upsampling, which the paper leaves open.
        scale_first: s before Up, which is not the paper's order.
    """
    masks = a.double()[:, None]
    if scale_first:
        masks = _scaled(masks)
    masks = F.interpolate(masks, x.shape[1:], mode="bilinear", align_corners=align_corners)
    if not scale_first:
        masks = _scaled(masks)
    x = x.double()
    return (score(x * masks) - score(torch.zeros_like(x)[None])).softmax(0)


def _scaled(masks: Tensor) -> Tensor:
    low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
    return torch.where(high == low, 0, (masks - low) / (high - low))


def ablation_cam_weights(score_behind: Scores, a: Tensor, value: float = 0.0) -> Tensor:
    """Desai and Ramaswamy 2020, eq. 2: the share of the score that is lost without channel k.

    Args:
        score_behind: score of activations (n, K, h, w) that all belong to one example.
        a: (K, h, w), its activations.
        value: what an ablated channel is set to; 0 in the paper.
    """
    a = a.double()
    ablated = a.repeat(len(a), 1, 1, 1)
    ablated[range(len(a)), range(len(a))] = value
    full_scores = score_behind(a[None])
    return (full_scores - score_behind(ablated)) / full_scores
