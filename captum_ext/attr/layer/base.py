"""Base classes of the layer CAMs: the constructor, the capture, and the weighted sum.

A new gradient CAM is a subclass of `BaseGradientCam` with one method:

    class LayerMyCam(BaseGradientCam):
        def weights(self, activations, gradients):
            return spatial_mean(gradients.abs())

For a type checker, `BaseGradientCam[LayerOrList]` gives a tensor for one layer and a list for a
list.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Generic

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from captum_ext._checks import reshaped, warn
from captum_ext._compat import (
    GradientAttribution,
    LayerAttribution,
    TargetType,
    _format_outputs,
    _format_tensor_into_tuples,
    log_usage,
)
from captum_ext._engine.capture import LayerCapture
from captum_ext._engine.modules import Forward, Tensors, find_module, module_name
from captum_ext._engine.outputs import check_one_score_per_example
from captum_ext._engine.precision import full_precision
from captum_ext._engine.state import preserve_state
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._repr import bounded_repr, options_repr
from captum_ext.attr._arguments import checks_arguments
from captum_ext.attr._method_info import MethodInfo
from captum_ext.attr.layer._typing import LayerOrList, Maps, maps_by_layer

ReshapeTransform = Callable[[Tensor], Tensor]


def spatial_sum(x: Tensor) -> Tensor:
    """Sum over the spatial dimensions, which keep the size 1; (B, C) stays as it is."""
    return x.reshape(*x.shape[:2], -1).sum(2).reshape(x.shape[:2] + (1,) * (x.dim() - 2))


def spatial_mean(x: Tensor) -> Tensor:
    """Mean over the spatial dimensions, which keep the size 1; (B, C) stays as it is."""
    return spatial_sum(x) / math.prod(x.shape[2:])


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient that is 0, with derivative 0, where the denominator is 0; NaN stays NaN."""
    is_zero = denominator == 0
    return torch.where(is_zero, 0, numerator / torch.where(is_zero, 1, denominator))


def weighted_sum(
    weights: Tensor, activations: Tensor, relu: bool, sum_channels: bool = True
) -> Tensor:
    """L = sum_k w_k A_k, rectified on request, in the activations' dtype."""
    cam = weights * full_precision(activations)
    if sum_channels:
        cam = cam.sum(1, keepdim=True)
    return (F.relu(cam) if relu else cam).to(activations.dtype)


@dataclass(eq=False, repr=False)
class BaseLayerCam(MethodInfo, LayerAttribution, Generic[LayerOrList]):
    """Base of all layer CAMs.

    The constructor is made of the annotated attributes, as in any dataclass: a subclass with
    options of its own is a dataclass, too, and writes one line for each option.

    For a type checker one layer gives a tensor, and a list of layers a list of tensors. A layer
    with several tensors gives a tuple instead of a tensor, which a type checker cannot know.

    Args:
        forward_func: the model, or a function of the inputs that runs it.
        layer: the layer, or a list of layers: modules, or their dotted names where `forward_func`
            is a module or its bound method.
        device_ids: devices of a DataParallel model, needed only when `forward_func` is a function
            around it (as in Captum).
        reshape_transform: turns a layer's tensor into (B, C, *spatial), for layers whose channels
            are not in dimension 1; it may move, drop and reorder values, but not change them. See
            `tokens_to_grid` and `channels_last_to_first`.
    """

    forward_func: Forward
    layer: LayerOrList
    device_ids: list[int] | None = None
    _: KW_ONLY
    reshape_transform: ReshapeTransform | None = None

    def __post_init__(self) -> None:
        transform, layer = self.reshape_transform, self.layer
        if transform is not None and not callable(transform):
            raise ArgumentTypeError(
                f"`reshape_transform` must be callable, got {bounded_repr(transform)}.",
                "reshape_transform",
            )
        if isinstance(layer, list) and not layer:
            raise ArgumentError("`layer` must hold at least one layer, got an empty list.", "layer")
        names = layer if isinstance(layer, list) else [layer]
        self.layers = [find_module(self.forward_func, name) for name in names]
        modules = self.layers if isinstance(layer, list) else self.layers[0]
        LayerAttribution.__init__(self, self.forward_func, modules, self.device_ids)  # type: ignore[call-arg]

    def __repr__(self) -> str:
        names = [module_name(self.forward_func, layer).strip("`") for layer in self.layers]
        return options_repr(self, layer=names if isinstance(self.layer, list) else names[0])

    def _activations(
        self,
        inputs: Tensor | Tensors,
        target: TargetType,
        additional_forward_args: Any,
        at_input: bool,
        needs_score: bool = True,
    ) -> tuple[list[Tensors], Tensor]:
        """The layers' activations as maps, and the target's scores (so every target is checked)."""
        capture = LayerCapture(self.forward_func, self.layers, **self._capture_options(at_input))
        activations, score = capture.activations(inputs, target, additional_forward_args)
        capture.check_channels(inputs, additional_forward_args)
        if needs_score:
            check_one_score_per_example(score)
        return self._as_maps(activations, inputs), score

    def _activations_and_gradients(
        self,
        inputs: Tensor | Tensors,
        target: TargetType,
        additional_forward_args: Any,
        at_input: bool,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> tuple[list[Tensors], list[Tensors]]:
        """The layers' activations and the gradients of the target's score there, as maps."""
        capture = LayerCapture(self.forward_func, self.layers, **self._capture_options(at_input))
        activations, gradients = capture.activations_and_gradients(
            inputs, target, additional_forward_args, grad_kwargs
        )
        capture.check_channels(inputs, additional_forward_args)
        return self._as_maps(activations, inputs), self._channels_first(gradients)

    def _capture_options(self, at_input: bool) -> dict[str, Any]:
        return {
            "at_input": at_input,
            "device_ids": self.device_ids,
            "traces_channels": self.reshape_transform is None,
        }

    def _as_maps(
        self,
        per_layer: list[Tensors],
        inputs: Tensor | Tensors,
        layers: Sequence[Module] | None = None,
    ) -> list[Tensors]:
        """The layers' activations as (B, C, *spatial).

        Raises:
            ValueError: a layer has no spatial dimensions, but an input has.
        """
        maps = self._channels_first(per_layer)
        images = [x for x in _format_tensor_into_tuples(inputs) if x.shape[2:].numel() > 1]
        for layer, tensors in zip(layers or self.layers, maps, strict=True):
            if images and all(t.shape[2:].numel() == 1 for t in tensors):
                message = (
                    f"`layer` {module_name(self.forward_func, layer)} has the shape "
                    f"{tuple(tensors[0].shape)}, so its map is one number for an input of "
                    f"{tuple(images[0].shape)}: choose a layer in front of the pooling, such as "
                    f"`suggest_layer(model)`."
                )
                if all(t.dim() <= 2 for t in tensors):
                    raise ArgumentError(message, "layer")
                warn(message)  # not certain: the image may be as small as a cell
        return maps

    def _channels_first(self, per_layer: list[Tensors]) -> list[Tensors]:
        """The layers' tensors as (B, C, *spatial)."""
        transform = self.reshape_transform
        return [tuple(reshaped(transform, t) for t in tensors) for tensors in per_layer]

    def _maps(self, cam: Callable[..., Tensor], *captured: Sequence[Tensors]) -> Maps[LayerOrList]:
        """The maps that `cam` makes of each tensor of each layer.

        Args:
            cam: a map from one tensor of each of `captured`.
            captured: activations, and what goes with them, a tuple of tensors for each layer.

        Returns:
            A list where the layers were given as a list; a tuple where a layer has several tensors.
        """
        maps = [
            tuple(cam(*tensors) for tensors in zip(*of_layer, strict=True))
            for of_layer in zip(*captured, strict=True)
        ]
        formatted: Maps[LayerOrList] = _format_outputs(isinstance(self.layer, list), maps)
        return formatted


class BaseGradientCam(BaseLayerCam[LayerOrList], GradientAttribution, ABC):
    r"""Base of the gradient CAMs: a sum of activations, weighted by a rule of their gradients.

    .. math:: L(x) = \sum_k w_k(x) A_k(x)

    A subclass gives `weights`; `attribute` has exactly the arguments of Captum's `LayerGradCam`.
    """

    family = "gradient"
    needs_gradients = True

    @abstractmethod
    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """The weights of the activations.

        Args:
            activations: A, (B, C, *spatial), float32 or better.
            gradients: dS/dA of the target's score S, in the same shape and dtype.

        Returns:
            A tensor that broadcasts with the activations: (B, C, 1, ...) or one weight a cell.
        """

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
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Maps[LayerOrList]:
        """The map of each example, raw and signed.

        Args:
            inputs: a tensor or tuple of tensors, examples in dimension 0.
            target: the entry of the output to explain, in any of Captum's forms. The model should
                return scores before the softmax, which mixes the classes.
            additional_forward_args: further arguments of `forward_func`, as in Captum.
            attribute_to_layer_input: take the layer's input instead of its output.
            relu_attributions: keep the positive part only.
            attr_dim_summation: sum over the channels; False keeps each channel's share.
            grad_kwargs: for `torch.autograd.grad`. `{"create_graph": True}` keeps the graph, so
                that the map can be differentiated.

        Returns:
            (B, 1, *spatial) of the layer, or (B, C, *spatial) where `attr_dim_summation` is False;
            a tuple for a layer with several tensors; a list for a list of layers.

        Raises:
            AssertionError: a target that the output does not have.
            ValueError: a layer that does not run, or runs twice, or has tokens instead of a map;
                or a target that does not depend on the layer.
            RuntimeError: inside `torch.inference_mode`.
        """
        with preserve_state(self.forward_func):
            activations, gradients = self._activations_and_gradients(
                inputs, target, additional_forward_args, attribute_to_layer_input, grad_kwargs
            )

        def cam(a: Tensor, g: Tensor) -> Tensor:
            weights = self.weights(full_precision(a), full_precision(g))
            return weighted_sum(weights, a, relu_attributions, attr_dim_summation)

        return self._maps(cam, activations, gradients)
