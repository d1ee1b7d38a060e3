"""HiResCAM (Draelos and Carin, 2020)."""

from torch import Tensor

from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer._typing import LayerOrList
from captum_ext.attr.layer.base import BaseGradientCam


class LayerHiResCam(BaseGradientCam[LayerOrList]):
    r"""HiResCAM: gradient x activation, summed over the channels.

    .. math:: L(x) = \sum_k g_k(x) A_k(x)

    It is Captum's `LayerGradientXActivation`, summed over the channels. On a network that ends in
    one linear layer, the map sums to the score without the bias.

    Arguments are those of `captum.attr.LayerGradCam`, and `reshape_transform` (see `BaseLayerCam`).

    Reference:
        Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of
        convolutional neural networks", https://arxiv.org/abs/2011.08891

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import LayerHiResCam
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> LayerHiResCam(net, conv).attribute(torch.rand(2, 3, 8, 8), target=5).shape
        torch.Size([2, 1, 6, 6])
    """

    title = "HiResCAM"
    paper = Paper("Draelos and Carin", 2020, "https://arxiv.org/abs/2011.08891")

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return gradients
