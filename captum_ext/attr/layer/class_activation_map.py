"""Class activation maps (Zhou et al., CVPR 2016)."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Conv1d, Conv2d, Conv3d, Linear, Module

from captum_ext._compat import (
    TargetType,
    log_usage,
)
from captum_ext._engine.modules import (
    Forward,
    Tensors,
    find_module,
    gather_shards,
    module_name,
    root_module,
)
from captum_ext._engine.precision import full_precision
from captum_ext._engine.state import preserve_state
from captum_ext._engine.targets import select_entries
from captum_ext.attr._arguments import checks_arguments
from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer._typing import Layer, LayerOrList, Maps, maps_by_layer
from captum_ext.attr.layer.base import BaseLayerCam, spatial_mean, weighted_sum

_CONVS = (Conv1d, Conv2d, Conv3d)


@dataclass(eq=False, repr=False, kw_only=True)
class LayerClassActivationMap(BaseLayerCam[LayerOrList]):
    r"""CAM: the activations, weighted by the class's row of the final linear layer (eq. 2).

    .. math:: L_c(x) = \sum_k W_{ck} A_k(x)

    For a network that ends in global average pooling and one linear layer (or a 1 x 1 convolution
    and the pooling). There the mean of the map plus the bias is the class's score, and Grad-CAM is
    CAM divided by the number of cells. The bias is ignored.

    Args:
        forward_func: the model; it must give logits, (B, classes).
        layer: the layer that the pooling reads.
        device_ids: as in Captum.
        reshape_transform: see `BaseLayerCam`.
        head: the linear layer or 1 x 1 convolution, or its name. None takes the last one of the
            model, and checks on each call that it is a CAM head, by the identity above.

    Raises:
        ValueError: no head, one of another width than the layer, or (where it was not given) one
            for which the identity fails because something else lies between.

    Reference:
        Zhou et al., "Learning Deep Features for Discriminative Localization",
        https://arxiv.org/abs/1512.04150

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_ext.attr import LayerClassActivationMap
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> LayerClassActivationMap(net, conv).attribute(torch.rand(2, 3, 8, 8), target=5).shape
        torch.Size([2, 1, 6, 6])
    """

    title = "CAM"
    paper = Paper("Zhou et al.", 2016, "https://arxiv.org/abs/1512.04150")
    family = "activation"

    head: Layer | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.head_is_given = self.head is not None
        self.linear = (
            _last_linear(self.forward_func)
            if self.head is None
            else find_module(self.forward_func, self.head, "head")
        )
        self.head_name = module_name(self.forward_func, self.linear)
        linear = self.linear
        is_pointwise = isinstance(linear, _CONVS) and set(linear.kernel_size) == {1}
        if not isinstance(linear, Linear) and not is_pointwise:
            raise ValueError(
                f"`head` {self.head_name} must be linear or a 1 x 1 convolution, got {linear}."
            )

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
        attr_dim_summation: bool = True,
    ) -> Maps[LayerOrList]:
        """The map of each example, raw and signed. Arguments as in `BaseGradientCam.attribute`."""
        with preserve_state(self.forward_func), torch.no_grad():
            # A spectral norm in train mode moves with each reading of the weight. The nested block
            # undoes the reading by the pass, so that the next one gives the same weight.
            with preserve_state(self.linear):
                per_layer, score = self._activations(
                    inputs, target, additional_forward_args, attribute_to_layer_input
                )
            rows = gather_shards(cast(Tensor, self.linear.weight)).flatten(1)
            classes = _classes(len(rows), target, score)

            def cam(a: Tensor) -> Tensor:
                self._check_head(a, rows, classes, score)
                weights = full_precision(rows[classes])
                weights = weights.reshape(weights.shape + (1,) * (a.dim() - 2))
                return weighted_sum(weights, a, relu_attributions, attr_dim_summation)

            return self._maps(cam, per_layer)

    def _check_head(self, activation: Tensor, rows: Tensor, classes: Tensor, score: Tensor) -> None:
        """Raise a ValueError unless the mean of the map and the bias add up to the score."""
        if activation.shape[1] != rows.shape[1]:
            raise ValueError(
                f"`head` {self.head_name} reads {rows.shape[1]} channels, but `layer` has "
                f"{activation.shape[1]} (shape {tuple(activation.shape)})."
            )
        if self.head_is_given:
            return
        terms = full_precision(rows[classes]) * spatial_mean(full_precision(activation)).flatten(1)
        bias = cast(Tensor | None, self.linear.bias)
        bias_of_class = 0 if bias is None else full_precision(gather_shards(bias))[classes]
        off = (terms.sum(1) + bias_of_class - full_precision(score).reshape(-1)).abs()
        half = {torch.float16, torch.bfloat16} & {activation.dtype, score.dtype, rows.dtype}
        tolerance = 5e-2 if half else 1e-3
        if not bool((off <= tolerance * (1 + terms.abs().sum(1))).all()):
            raise ValueError(
                f"The score is not {self.head_name} of the mean of `layer`: something else lies "
                f"between them, so the class activation map is not defined here. Take the layer "
                f"that the global average pooling reads, or another method; to take the rows of "
                f"{self.head_name} all the same, pass it as `head`."
            )


def _classes(n_classes: int, target: TargetType, score: Tensor) -> Tensor:
    """The class that `target` selects for each example, by selecting from the class numbers."""
    numbers = torch.arange(n_classes, device=score.device).expand(len(score), n_classes)
    assert target is not None or n_classes == 1, "Target not provided when necessary."
    selected: Tensor = select_entries(numbers, target)
    return selected.reshape(-1)


def _last_linear(forward_func: Forward) -> Module:
    root = root_module(forward_func)
    if root is None:
        raise ValueError("`head` is needed where `forward_func` is not a module: pass the layer.")
    linears = [module for module in root.modules() if isinstance(module, (Linear, *_CONVS))]
    if not linears:
        raise ValueError("`head` is None, and the model has no linear layer or convolution.")
    return linears[-1]
