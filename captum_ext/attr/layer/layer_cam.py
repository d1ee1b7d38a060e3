"""LayerCAM (Jiang et al., TIP 2021)."""

from torch import Tensor
from torch.nn import functional as F

from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer._typing import LayerOrList
from captum_ext.attr.layer.base import BaseGradientCam


class LayerCam(BaseGradientCam[LayerOrList]):
    r"""LayerCAM: each activation weighted by its own positive gradient (eqs. 5 and 6).

    .. math:: L(x) = \sum_k [g_k(x)]_+ A_k(x)

    It stays sharp in early layers, where one weight for a whole channel is too coarse. The paper
    rectifies the map (`relu_attributions=True`) and fuses several layers:
    `UpsampleWrapper(LayerCam(model, layers), fuse="max", normalize="tanh")`.

    Arguments are those of `captum.attr.LayerGradCam`, and `reshape_transform` (see `BaseLayerCam`).

    Reference:
        Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization",
        IEEE TIP 30, 2021, https://doi.org/10.1109/TIP.2021.3089943

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import LayerCam
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> LayerCam(net, conv).attribute(torch.rand(2, 3, 8, 8), target=5).shape
        torch.Size([2, 1, 6, 6])
    """

    title = "LayerCAM"
    paper = Paper("Jiang et al.", 2021, "https://doi.org/10.1109/TIP.2021.3089943")

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return F.relu(gradients)
