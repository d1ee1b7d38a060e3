"""Grad-CAM++ (Chattopadhay et al., WACV 2018)."""

from torch import Tensor
from torch.nn import functional as F

from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer._typing import LayerOrList
from captum_ext.attr.layer.base import BaseGradientCam, divide, spatial_sum


class LayerGradCamPlusPlus(BaseGradientCam[LayerOrList]):
    r"""Grad-CAM++: positive gradients, weighted so that each appearance of the object counts.

    With g the gradient of the score S at the layer, and the sums over all cells (eqs. 5, 7, 19):

    .. math::
        w_k = \sum_x \alpha_k(x) [g_k(x)]_+, \qquad
        \alpha_k(x) = \frac{g_k(x)^2}{2 g_k(x)^2 + g_k(x)^3 \sum_y A_k(y)}

    The paper explains exp(S), which multiplies all weights by exp(S); that common factor is left
    out. The fraction is computed in its reduced form 1 / (2 + g_k sum A_k), in which no power of a
    small gradient underflows. Where its denominator is 0, alpha is 0.

    Arguments are those of `captum.attr.LayerGradCam`, and `reshape_transform` (see `BaseLayerCam`).

    Reference:
        Chattopadhay et al., "Grad-CAM++: Improved Visual Explanations for Deep Convolutional
        Networks", https://arxiv.org/abs/1710.11063

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import LayerGradCamPlusPlus
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> LayerGradCamPlusPlus(net, conv).attribute(torch.rand(2, 3, 8, 8), target=5).shape
        torch.Size([2, 1, 6, 6])
    """

    title = "Grad-CAM++"
    paper = Paper("Chattopadhay et al.", 2018, "https://arxiv.org/abs/1710.11063")

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        positive = F.relu(gradients)
        return spatial_sum(divide(positive, 2 + positive * spatial_sum(activations)))
