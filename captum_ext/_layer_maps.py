"""The maps of a layer: normalised pictures, run through a model up to a layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from captum_ext._checks import reshaped
from captum_ext._data.pixels import Normalize
from captum_ext._engine.capture import LayerCapture
from captum_ext._engine.modules import (
    Forward,
    Tensors,
    find_module,
    module_device,
    module_name,
    parameter_dtype,
    root_module,
)
from captum_ext._engine.replay import run_to_layer
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._identity import versioned_name

ReshapeTransform = Callable[[Tensor], Tensor]


class LayerMaps:
    """A model up to a layer, as a function from images to maps (B, C, h, w).

    Args:
        forward_func: the model.
        layer: the layer, as a module or by its dotted name.
        normalize: (mean, std) of each channel, as the model expects pictures.
        reshape_transform: turns the layer's output into (B, C, h, w).

    Raises:
        ValueError: `layer` or `normalize` is invalid.
        TypeError: `layer` or `reshape_transform` has the wrong type.
    """

    def __init__(
        self,
        forward_func: Forward,
        layer: Module | str,
        *,
        normalize: Any,
        reshape_transform: ReshapeTransform | None,
    ) -> None:
        if reshape_transform is not None and not callable(reshape_transform):
            raise ArgumentTypeError(
                f"`reshape_transform` must be callable, got {reshape_transform!r}.",
                argument="reshape_transform",
            )
        self.forward_func, self.layer = forward_func, find_module(forward_func, layer)
        self.normalize = Normalize(normalize)
        self.reshape_transform = reshape_transform

    @property
    def name(self) -> str:
        """The layer's dotted name."""
        return module_name(self.forward_func, self.layer).strip("`")

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return module_device(self._owner)

    @property
    def _owner(self) -> Module:
        return root_module(self.forward_func) or self.layer

    def fingerprint(self) -> dict[str, Any]:
        """The settings by which stored work recognises the layer, without the model's weights."""
        return {
            "layer": self.name,
            "normalize": self.normalize.to_lists(),
            "reshape_transform": versioned_name("`reshape_transform`", self.reshape_transform),
        }

    def images(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [0, 1] as the model takes them, in its dtype."""
        return self.normalize(pictures).to(parameter_dtype(self._owner))

    def __call__(self, images: Tensor) -> Tensor:
        """The maps, with a graph to the images where gradients are switched on.

        Raises:
            ValueError: the layer does not run, or its output is no map.
        """
        return self._to_maps(run_to_layer(self.forward_func, self.layer, (images,)), images)

    def run_full_pass(self, images: Tensor) -> Tensor:
        """The maps, without a graph, from a pass through the whole model, which checks the layer.

        Raises:
            ValueError: the layer does not run, or runs twice; its output is no map, or has its
                channels elsewhere than in dimension 1.
        """
        traces_channels = self.reshape_transform is None
        capture = LayerCapture(self.forward_func, [self.layer], traces_channels=traces_channels)
        (tensors,), _ = capture.activations((images,))
        capture.check_channels(images)
        return self._to_maps(tensors, images)

    def _to_maps(self, tensors: Tensors, images: Tensor) -> Tensor:
        if len(tensors) != 1:
            raise ArgumentError(
                f"`layer` `{self.name}` gives {len(tensors)} tensors, and not one.", "layer"
            )
        maps = reshaped(self.reshape_transform, tensors[0])
        if maps.dim() == 2:  # a linear layer, whose units see the whole image
            maps = maps[:, :, None, None]
        if maps.dim() != 4 or len(maps) != len(images):
            raise ArgumentError(
                f"`layer` `{self.name}` must give (B, C, h, w) or (B, C), after "
                f"`reshape_transform`, got {tuple(maps.shape)} for {len(images)} images.",
                "layer",
            )
        return maps
