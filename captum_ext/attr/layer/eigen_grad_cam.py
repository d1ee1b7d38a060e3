"""Eigen-Grad-CAM, of the package grad-cam (Gildenblat, 2021)."""

import torch
from torch import Tensor

from captum_ext._engine.precision import divide_by_power
from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer._typing import LayerOrList
from captum_ext.attr.layer.base import BaseGradientCam
from captum_ext.attr.layer.eigen_cam import projection_sign


class LayerEigenGradCam(BaseGradientCam[LayerOrList]):
    r"""Eigen-Grad-CAM: gradient x activation, projected on its first principal direction.

    With G the matrix of gradient x activation, cells x channels, and :math:`G = U \Sigma V^T`:

    .. math:: L(x) = \sum_k v_{1k} \, g_k(x) A_k(x)

    It is Eigen-CAM for a class. The sign of a singular vector is arbitrary: here the map correlates
    with HiResCAM, the sum of G over the channels. If that is zero but for rounding, the value
    farthest from 0 is positive. The package grad-cam, which has no paper for it, leaves the sign as
    it comes, and subtracts each channel's mean first.

    Arguments are those of `captum.attr.LayerGradCam`, and `reshape_transform` (see `BaseLayerCam`).

    Raises:
        ValueError: activations or gradients that are not finite.

    Reference:
        Gildenblat and contributors, "PyTorch library for CAM methods",
        https://github.com/jacobgil/pytorch-grad-cam

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import LayerEigenGradCam
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> LayerEigenGradCam(net, conv).attribute(torch.rand(2, 3, 8, 8), target=5).shape
        torch.Size([2, 1, 6, 6])
    """

    title = "Eigen-Grad-CAM"
    paper = Paper("Gildenblat", 2021, "https://github.com/jacobgil/pytorch-grad-cam")

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        if not bool((torch.isfinite(gradients) & torch.isfinite(activations)).all()):
            raise ValueError("The activations or gradients of `layer` are not finite.")
        product = divide_by_power(gradients)[0] * divide_by_power(activations)[0]
        g, _ = divide_by_power(product.reshape(*activations.shape[:2], -1))  # (B, channels, cells)
        v: Tensor = torch.linalg.svd(g, full_matrices=False).U[:, :, :1]
        cam = (v.mT @ g)[:, 0]
        sign = projection_sign(cam, g.mean(1), g.abs().mean(1), gradients.dtype)
        v = v * sign[:, None, None]
        return gradients * v.reshape(g.shape[:2] + (1,) * (gradients.dim() - 2))
