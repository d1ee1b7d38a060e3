"""XGrad-CAM (Fu et al., BMVC 2020)."""

from torch import Tensor

from captum_ext._engine.precision import divide_by_power
from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer._typing import LayerOrList
from captum_ext.attr.layer.base import BaseGradientCam, divide, spatial_sum


class LayerXGradCam(BaseGradientCam[LayerOrList]):
    r"""XGrad-CAM: gradients averaged with the activations as weights (eq. 8).

    .. math:: w_k = \frac{\sum_x g_k(x) A_k(x)}{\sum_x A_k(x)}

    The map then has the same sum as gradient x activation (sensitivity and conservation). A channel
    whose activations sum to 0 gets the weight 0.

    Arguments are those of `captum.attr.LayerGradCam`, and `reshape_transform` (see `BaseLayerCam`).

    Reference:
        Fu et al., "Axiom-based Grad-CAM: Towards Accurate Visualization and Explanation of CNNs",
        https://arxiv.org/abs/2008.02312

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import LayerXGradCam
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> LayerXGradCam(net, conv).attribute(torch.rand(2, 3, 8, 8), target=5).shape
        torch.Size([2, 1, 6, 6])
    """

    title = "XGrad-CAM"
    paper = Paper("Fu et al.", 2020, "https://arxiv.org/abs/2008.02312")

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        a, _ = divide_by_power(activations)
        return divide(spatial_sum(gradients * a), spatial_sum(a))
