"""Grad-CAM (Selvaraju et al., ICCV 2017) for layers of tokens, which Captum's cannot read."""

from torch import Tensor

from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer._typing import LayerOrList
from captum_ext.attr.layer.base import BaseGradientCam, spatial_mean


class LayerTokenGradCam(BaseGradientCam[LayerOrList]):
    r"""Grad-CAM with a `reshape_transform`, for transformers (eqs. 1 and 2).

    .. math:: w_k = \frac{1}{N} \sum_x g_k(x)

    Where dimension 1 holds the channels, the map is that of `captum.attr.LayerGradCam`: use that
    one there. Of tokens (B, T, C), Captum's class takes the tokens for channels, and its map over
    the features explains nothing.

    Arguments are those of `captum.attr.LayerGradCam`, and `reshape_transform` (see `BaseLayerCam`).

    Reference:
        Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
        Localization", https://arxiv.org/abs/1610.02391

    Example:
        >>> import torch
        >>> from torchvision.models import VisionTransformer
        >>> from captum_ext.attr import LayerTokenGradCam, suggest_layer, tokens_to_grid
        >>> vit = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10).eval()
        >>> cam = LayerTokenGradCam(vit, suggest_layer(vit), reshape_transform=tokens_to_grid)
        >>> cam.attribute(torch.rand(2, 3, 32, 32), target=5).shape
        torch.Size([2, 1, 4, 4])
    """

    title = "Grad-CAM"
    paper = Paper("Selvaraju et al.", 2017, "https://arxiv.org/abs/1610.02391")

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return spatial_mean(gradients)
