"""A classifier up to a layer: what Perception Visualization decodes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_tensor
from torch.nn import Module

from captum_ext._data.pixels import IMAGENET_MEAN_STD, Normalize
from captum_ext._engine.modules import (
    Forward,
    find_module,
    module_name,
    parameter_dtype,
    require_module,
)
from captum_ext._engine.precision import full_precision
from captum_ext._engine.replay import run_to_layer
from captum_ext._identity import digest, versioned_name


class LayerEncoder:
    r"""E: pictures to the latents of a layer, without what the classifier does behind it.

    A call gives `E(images)`, with a graph to the images, and to parameters that are not frozen,
    unless gradients are switched off. The classifier is run as it stands: in train mode its batch
    statistics move, which `PerceptionVisualization` puts back.

    Args:
        forward_func: the classifier: a module, or its bound method.
        layer: whose output is decoded, as a module or by name. The paper has the input of the
            global average pooling: `"layer4"` of a ResNet, `"features"` of many others.
        normalize: mean and standard deviation of each channel, as the classifier expects pictures;
            of one channel where it takes grey ones. ImageNet's. (The authors' classifier takes
            pictures in [0, 1] as they are: `((0, 0, 0), (1, 1, 1))`.)
        reshape_transform: of the layer's output to (N, C, h, w), as the layer methods take it;
            `tokens_to_grid` for a vision transformer. A decoder knows one of your own by its name
            and an attribute `version`: ``my_transform.version = "1"`` below its definition.

    Raises:
        ValueError: a plain function, a layer that is unknown, `normalize` out of range.
        TypeError: a layer of another kind.

    Shape:
        - images: (N, channels, H, W), as the classifier takes them.
        - latents: (N, C, h, w), in float32 or better.

    Example:
        >>> import torch
        >>> from captum_ext.perception import LayerEncoder
        >>> from torchvision.models import resnet18
        >>> encoder = LayerEncoder(resnet18().eval(), "layer4")
        >>> encoder(encoder.images(torch.rand(2, 3, 64, 64))).shape
        torch.Size([2, 512, 2, 2])
    """

    def __init__(
        self,
        forward_func: Forward,
        layer: Module | str,
        *,
        normalize: tuple[Sequence[float], Sequence[float]] = IMAGENET_MEAN_STD,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.forward_func, self.root = forward_func, require_module(forward_func)
        self.layer = find_module(forward_func, layer)
        self.normalize = Normalize(normalize)
        self.reshape_transform = reshape_transform

    @property
    def channels(self) -> int:
        """How many the images have, 3 or 1."""
        return self.normalize.channels

    @property
    def name(self) -> str:
        """Of the layer."""
        return module_name(self.forward_func, self.layer).strip("`")

    def fingerprint(self) -> dict[str, Any]:
        """By what a decoder knows the encoder that it was made for, without the weights' values."""
        shapes = [(k, tuple(v.shape)) for k, v in self.root.state_dict().items() if is_tensor(v)]
        return {
            "architecture": digest(shapes),
            "layer": self.name,
            "normalize": self.normalize.to_lists(),
            "reshape_transform": versioned_name("`reshape_transform`", self.reshape_transform),
        }

    def images(self, pictures: Tensor) -> Tensor:
        """Pictures in [0, 1] as the classifier takes them, in its dtype."""
        return self.normalize(pictures).to(parameter_dtype(self.root))

    def pictures(self, images: Tensor) -> Tensor:
        """Images as the classifier takes them as pictures, cut off at [0, 1]."""
        return self.normalize.inverse(full_precision(images.detach()))

    def __call__(self, images: Tensor) -> Tensor:
        """The latents of images.

        Raises:
            ValueError: the layer does not run, or has no height and width.
        """
        latents = run_to_layer(self.forward_func, self.layer, (images,))[0]
        if self.reshape_transform is not None:
            latents = self.reshape_transform(latents)
        if latents.dim() != 4 or latents.shape[2:].numel() == 1:
            raise ValueError(
                f"`layer` {self.name} has no space to decode: of images {tuple(images.shape)} it "
                f"gives {tuple(latents.shape)}, and (N, C, h, w) of more than one cell is needed. "
                f"Choose a layer in front of the pooling, or a `reshape_transform` for tokens."
            )
        return full_precision(latents)


def stride_of(encoder: LayerEncoder, images: Tensor) -> tuple[int, int]:
    """The latent's channels, and how many pixels a side one of its cells has: a power of two.

    Raises:
        ValueError: no such power brings the latent to the images' size.
    """
    with torch.no_grad():
        _, channels, *cells = encoder(images[:1]).shape
    sides = list(zip(images.shape[2:], cells, strict=True))
    powers = [2**i for i in range(max(images.shape[2:]).bit_length())]
    fitting = [s for s in powers if all(fits(side, n, s) for side, n in sides)]
    if not fitting:
        raise ValueError(
            f"`layer` {encoder.name} gives {tuple(cells)} cells of {tuple(images.shape[2:])} "
            f"pixels, and a decoder doubles the size so many times: choose a layer, or images, of "
            f"which the ratio is near a power of two."
        )
    return channels, min(fitting, key=lambda s: sum(abs(side / s - n) for side, n in sides))


def fits(side: int, cells: int, stride: int) -> bool:
    """Whether so many cells of a stride are a picture's side, rounded or within a quarter of it.

    Layers without padding have fewer cells: AlexNet's 6 of 224 pixels, at a stride of 32.
    """
    return cells in (side // stride, -(-side // stride)) or 4 * abs(cells * stride - side) <= side
