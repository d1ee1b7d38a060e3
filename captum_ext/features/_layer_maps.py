"""A layer's maps of the pictures of a data set."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from captum_ext._data.pixels import Normalize
from captum_ext._engine.capture import LayerCapture
from captum_ext._engine.modules import (
    Forward,
    Tensors,
    find_module,
    module_name,
    parameter_dtype,
    root_module,
)
from captum_ext._engine.replay import run_to_layer
from captum_ext._identity import versioned_name

ReshapeTransform = Callable[[Tensor], Tensor]


class LayerMaps:
    """What a layer makes of images, as maps (B, C, h, w).

    Args:
        forward_func: the model.
        layer: the layer or its name.
        normalize: (mean, std) of each channel.
        reshape_transform: turns what the layer puts out into (B, C, h, w).
    """

    def __init__(
        self,
        forward_func: Forward,
        layer: Module | str,
        normalize: Any,
        reshape_transform: ReshapeTransform | None,
    ) -> None:
        if reshape_transform is not None and not callable(reshape_transform):
            raise TypeError(f"`reshape_transform` must be callable, got {reshape_transform!r}.")
        self.layer = find_module(forward_func, layer)
        self.forward_func, self.reshape_transform = forward_func, reshape_transform
        self.name = module_name(forward_func, self.layer).strip("`")
        owner = root_module(forward_func) or self.layer
        self.device = next(owner.parameters(), torch.empty(0)).device
        self.dtype = parameter_dtype(owner)
        self.normalize = Normalize(normalize).to(self.device)

    def images(self, pixels: Tensor) -> Tensor:
        """Bytes (B, 3, H, W), wherever they are, as the model takes them."""
        return self.normalize(pixels.to(self.device) / 255).to(self.dtype)

    def __call__(self, images: Tensor) -> Tensor:
        """The maps, without a graph."""
        capture = LayerCapture(self.forward_func, [self.layer], **self._options)
        (tensors,), _ = capture.activations((images,))
        capture.check_channels(images)
        return self._on_grid(tensors, images)

    def with_graph(self, images: Tensor) -> Tensor:
        """The maps, with a graph from the images on, where gradients are switched on."""
        tensors = run_to_layer(self.forward_func, self.layer, (images,), **self._options)
        return self._on_grid(tensors, images)

    @property
    def _options(self) -> dict[str, Any]:
        return {"traces_channels": self.reshape_transform is None}

    def _on_grid(self, tensors: Tensors, images: Tensor) -> Tensor:
        if len(tensors) != 1:
            raise ValueError(f"`layer` `{self.name}` gives {len(tensors)} tensors, and not one.")
        maps = tensors[0]
        if self.reshape_transform is not None:
            maps = self.reshape_transform(maps)
        if maps.dim() == 2:  # units that see the whole image, as those of a linear layer
            maps = maps[:, :, None, None]
        if maps.dim() != 4 or len(maps) != len(images):
            raise ValueError(
                f"`layer` `{self.name}` must give (B, C, h, w) or (B, C), after "
                f"`reshape_transform`, got {tuple(maps.shape)} for {len(images)} images."
            )
        return maps

    def fingerprint(self) -> dict[str, Any]:
        """How a run that goes on knows that it is the same; not the model's weights."""
        return {
            "layer": self.name,
            "normalize": self.normalize.to_lists(),
            "reshape_transform": versioned_name("`reshape_transform`", self.reshape_transform),
        }
