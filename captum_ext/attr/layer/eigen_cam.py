"""Eigen-CAM (Muhammad and Yeasin, IJCNN 2020)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_ext._compat import (
    TargetType,
    log_usage,
)
from captum_ext._engine.modules import Tensors
from captum_ext._engine.precision import divide_by_power, full_precision
from captum_ext._engine.state import preserve_state
from captum_ext.attr._arguments import checks_arguments
from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer._typing import LayerOrList, Maps, maps_by_layer
from captum_ext.attr.layer.base import BaseLayerCam


@dataclass(eq=False, repr=False, kw_only=True)
class LayerEigenCam(BaseLayerCam[LayerOrList]):
    r"""Eigen-CAM: the activations' projection on their first principal direction.

    With A the matrix of cells x channels and :math:`A = U \Sigma V^T` (eqs. 2 and 3):

    .. math:: L = A v_1 = \sigma_1 u_1

    The map does not depend on the class, so no `target` is needed. The sign of a singular vector is
    arbitrary. Here it is chosen so that the map correlates with the mean activation; non-negative
    activations then give a non-negative map. If the mean is zero but for rounding (after a layer
    norm), the value farthest from 0 is positive.

    Args:
        forward_func: the model.
        layer: a layer or a list of layers.
        device_ids: as in Captum.
        reshape_transform: see `BaseLayerCam`.
        center: subtract each channel's mean over the cells first, as the package grad-cam does
            and the paper does not. A flat activation then gives zeros.

    Reference:
        Muhammad and Yeasin, "Eigen-CAM: Class Activation Map using Principal Components",
        https://arxiv.org/abs/2008.00299

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import LayerEigenCam
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> LayerEigenCam(net, conv).attribute(torch.rand(2, 3, 8, 8), target=5).shape
        torch.Size([2, 1, 6, 6])
    """

    title = "Eigen-CAM"
    paper = Paper("Muhammad and Yeasin", 2020, "https://arxiv.org/abs/2008.00299")
    family = "activation"

    center: bool = False

    @maps_by_layer
    @log_usage()
    @checks_arguments
    def attribute(
        self,
        inputs: Tensor | Tensors,
        target: TargetType = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
    ) -> Maps[LayerOrList]:
        """The map of each example. Arguments as in `BaseGradientCam.attribute`.

        The map does not depend on `target`. It is checked if it is passed; None serves models
        without a single score, too.

        Raises:
            ValueError: activations that are not finite, which have no singular vectors.
        """
        with preserve_state(self.forward_func), torch.no_grad():
            per_layer, _ = self._activations(
                inputs,
                target,
                additional_forward_args,
                attribute_to_layer_input,
                needs_score=target is not None,
            )
            return self._maps(lambda a: self._project(a, relu_attributions), per_layer)

    def _project(self, activation: Tensor, relu: bool) -> Tensor:
        a = full_precision(activation)
        a = a.reshape(*a.shape[:2], -1).transpose(1, 2)  # (B, cells, channels)
        if not bool(torch.isfinite(a).all()):
            raise ValueError("The activations of `layer` are not finite: they have no Eigen-CAM.")
        a, power = divide_by_power(a)
        mean, mean_size = a.mean(2), a.abs().mean(2)
        if self.center:
            a = a - a.mean(1, keepdim=True)
        cam = _project_on_first_component(a)
        sign = projection_sign(cam[:, :, 0], mean, mean_size, activation.dtype)
        cam = torch.mul(sign[:, None, None] * power, cam).reshape(len(a), 1, *activation.shape[2:])
        return (F.relu(cam) if relu else cam).to(activation.dtype)


def projection_sign(cam: Tensor, mean: Tensor, mean_size: Tensor, dtype: torch.dtype) -> Tensor:
    """The sign with which projections correlate with a mean, (B,).

    If the mean is zero but for rounding, the sign makes the value farthest from 0 positive.

    Args:
        cam: the projections, (B, cells).
        mean: the mean over the channels, (B, cells).
        mean_size: the mean of absolute values.
        dtype: the dtype that the activations were rounded to.
    """
    correlation, bound = (cam * mean).sum(1), (cam.abs() * mean_size).sum(1)
    is_noise = correlation.abs() <= max(1e-4, torch.finfo(dtype).eps / 4) * bound
    farthest = cam.gather(1, cam.abs().argmax(1, keepdim=True))[:, 0]
    return torch.where(torch.where(is_noise, farthest, correlation) < 0, -1, 1)


def _project_on_first_component(a: Tensor) -> Tensor:
    """A v_1, (B, n, 1), for matrices A (B, n, m), from the smaller of the two Gram matrices."""
    if a.shape[1] <= a.shape[2]:
        values, vectors = torch.linalg.eigh(a @ a.mT)
        length = values[:, -1:, None].clamp_min(0).sqrt()
        return torch.mul(length, vectors[:, :, -1:])
    _, vectors = torch.linalg.eigh(a.mT @ a)
    return torch.matmul(a, vectors[:, :, -1:])
