"""Positive-gradient Grad-CAM, after Sharpen Focus (Wang et al., ICCV 2019)."""

from torch import Tensor
from torch.nn import functional as F

from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer._typing import LayerOrList
from captum_ext.attr.layer.base import BaseGradientCam, spatial_mean


class LayerSharpenFocus(BaseGradientCam[LayerOrList]):
    r"""Sharpen Focus: Grad-CAM with the mean of the positive gradients only.

    .. math:: w_k = \frac{1}{N} \sum_x [g_k(x)]_+

    The paper trains classifiers with such maps; only the weight is taken from it. It rectifies the
    maps (`relu_attributions=True`).

    Arguments are those of `captum.attr.LayerGradCam`, and `reshape_transform` (see `BaseLayerCam`).

    Reference:
        Wang et al., "Sharpen Focus: Learning with Attention Separability and Consistency",
        https://arxiv.org/abs/1811.07484

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import LayerSharpenFocus
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> LayerSharpenFocus(net, conv).attribute(torch.rand(2, 3, 8, 8), target=5).shape
        torch.Size([2, 1, 6, 6])
    """

    title = "Sharpen Focus"
    paper = Paper("Wang et al.", 2019, "https://arxiv.org/abs/1811.07484")

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return spatial_mean(F.relu(gradients))
