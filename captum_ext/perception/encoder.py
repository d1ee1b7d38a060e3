"""A classifier up to a layer, whose latents Perception Visualization decodes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_tensor
from torch.nn import Module

from captum_ext._data.pixels import IMAGENET_MEAN_STD
from captum_ext._engine.modules import Forward, Tensors, require_module
from captum_ext._engine.precision import full_precision
from captum_ext._errors import ArgumentError
from captum_ext._identity import digest
from captum_ext._layer_maps import LayerMaps, ReshapeTransform
from captum_ext._repr import options_repr


class LayerEncoder(LayerMaps):
    r"""The encoder E: a classifier up to a layer, from images to the layer's latents.

    `encoder(images)` is E(images). It has a graph to the images, and to parameters that are not
    frozen, unless gradients are switched off. The classifier runs in the mode that it is in: in
    train mode its batch statistics move (`PerceptionVisualization` puts them back).

    Args:
        forward_func: the classifier: a module, or its bound method.
        layer: the layer whose output is decoded, as a module or by name. The paper takes the input
            of the global average pooling: `"layer4"` of a ResNet, `"features"` of many others.
        normalize: (mean, std) of each channel, as the classifier expects pictures; of one channel
            for models of grey pictures. ImageNet's. (The authors' classifier takes pictures in
            [0, 1] as they are: `((0, 0, 0), (1, 1, 1))`.)
        reshape_transform: turns the layer's output into (N, C, h, w), as for the layer methods:
            `tokens_to_grid` for a vision transformer. A decoder recognises your own function by its
            name and its attribute `version`: ``my_transform.version = "1"`` below its definition.

    Raises:
        ValueError: `forward_func` is a plain function, `layer` is unknown, or `normalize` is out of
            range.
        TypeError: `layer` or `reshape_transform` has the wrong type.

    Shape:
        - images: (N, channels, H, W), as the classifier takes them.
        - latents: (N, C, h, w), in float32 or float64, with more than one cell.

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
        reshape_transform: ReshapeTransform | None = None,
    ) -> None:
        self.root = require_module(forward_func)
        super().__init__(
            forward_func, layer, normalize=normalize, reshape_transform=reshape_transform
        )

    def __repr__(self) -> str:
        # Rounded, as float32 has not exactly the numbers that were passed.
        normalize = tuple(tuple(round(v, 6) for v in row) for row in self.normalize.to_lists())
        return options_repr(self, layer=self.name, normalize=normalize)

    @property
    def channels(self) -> int:
        """The number of channels of the classifier's images, 3 or 1."""
        return self.normalize.channels

    def fingerprint(self) -> dict[str, Any]:
        """The settings by which a decoder recognises its encoder, without values of weights."""
        shapes = [(k, tuple(v.shape)) for k, v in self.root.state_dict().items() if is_tensor(v)]
        return {"architecture": digest(shapes), **super().fingerprint()}

    def pictures(self, images: Tensor) -> Tensor:
        """Images, as the classifier takes them, as pictures in [0, 1]; values outside are cut."""
        return self.normalize.inverse(full_precision(images.detach()))

    def _to_maps(self, tensors: Tensors, images: Tensor) -> Tensor:
        latents = super()._to_maps(tensors, images)
        if latents.shape[2:].numel() == 1:
            raise ArgumentError(
                f"`layer` `{self.name}` has no space to decode: for images {tuple(images.shape)} "
                f"it gives {tuple(latents.shape)}, and a decoder needs (N, C, h, w) of more than "
                f"one cell. Choose a layer in front of the pooling, or a `reshape_transform` for "
                f"tokens.",
                "layer",
            )
        return full_precision(latents)


def channels_and_stride(encoder: LayerEncoder, images: Tensor) -> tuple[int, int]:
    """The latents' channels, and the side of one of their cells in pixels, a power of two.

    Raises:
        ValueError: no power of two scales the latents to the images' size.
    """
    with torch.no_grad():
        _, channels, *cells = encoder(images[:1]).shape
    sides = list(zip(images.shape[2:], cells, strict=True))
    powers = [2**i for i in range(max(images.shape[2:]).bit_length())]
    strides = [s for s in powers if all(stride_fits(side, n, s) for side, n in sides)]
    if not strides:
        raise ArgumentError(
            f"`layer` `{encoder.name}` gives {tuple(cells)} cells for {tuple(images.shape[2:])} "
            f"pixels, but a decoder can only double the size: choose a layer, or a size of images, "
            f"with a ratio near a power of two.",
            "layer",
        )
    return channels, min(strides, key=lambda s: sum(abs(side / s - n) for side, n in sides))


def stride_fits(side: int, cells: int, stride: int) -> bool:
    """Return whether cells x stride is a picture's side, up to rounding or a quarter of the side.

    The quarter is for layers without padding, which have fewer cells: AlexNet has 6 cells for 224
    pixels at a stride of 32.
    """
    return cells in (side // stride, -(-side // stride)) or 4 * abs(cells * stride - side) <= side
