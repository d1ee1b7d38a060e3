"""Coarse maps of an attribution, the teacher of an F-CAM decoder."""

from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.nn import Module

from captum_ext._engine.modules import Forward, root_module
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext.attr._chain import call_attribute, wrapped_method
from captum_ext.imaging import min_max, one_channel, resize


def guide_maps(
    guide: Attribution,
    images: Tensor,
    target: Tensor,
    size: tuple[int, int] | None = None,
    *,
    rectify: bool = True,
    **kwargs: Any,
) -> Tensor:
    """The guide's map of each image for its own label, in [0, 1].

    Channels are summed (if all are equal, as in the maps of wrappers, one is taken). Negative
    values are set to 0, and the map is scaled to [0, 1] at its own resolution, then resized
    bilinearly. Flat and non-finite maps become zeros, which give no seeds.

    Args:
        guide: an attribution that gives (N, C, h, w), or a tuple with that as its first entry.
        images: (N, C, H, W), as the classifier takes them.
        target: labels (N,), int64.
        size: (H, W) of the maps. None keeps the guide's own resolution.
        rectify: whether negative values become 0. The authors do so for all methods but CAM.
        **kwargs: arguments of the guide's `attribute`.

    Returns:
        Maps (N, 1, H, W), without a graph.

    Raises:
        ValueError: the guide's maps do not have two spatial dimensions, or are a single pixel.
    """
    maps = call_attribute(guide, images, target=target, **kwargs)
    maps = maps[0] if isinstance(maps, tuple) else maps
    if not isinstance(maps, Tensor) or maps.dim() != 4 or len(maps) != len(images):
        result = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps)
        raise ArgumentError(
            f"`guide` must give a map (N, C, h, w) of each image, and {guide.get_name()} gives "
            f"{result}: choose a layer with maps, or a `reshape_transform`.",
            "guide",
        )
    if maps.shape[2:].numel() == 1:
        raise ArgumentError(
            f"`guide` {guide.get_name()} gives maps of a single pixel: choose a layer in front of "
            f"it, or larger pictures.",
            "guide",
            "single_cell",
        )
    maps = one_channel(maps.detach())
    maps = torch.where(torch.isfinite(maps).flatten(1).all(1)[:, None, None, None], maps, 0)
    maps = min_max(maps.clamp(min=0) if rectify else maps)
    return maps if size is None else resize(maps, size)


def check_guide(guide: Any, classifier: Forward) -> None:
    """Raise an error unless `guide` is an attribution of the classifier.

    Raises:
        TypeError: `guide` is no attribution.
        ValueError: `guide` explains another model, or a layer of another model.
    """
    if not isinstance(guide, Attribution):
        raise ArgumentTypeError(
            f"`guide` must be a Captum Attribution, got {type(guide)}.", "guide"
        )
    inner = wrapped_method(guide)
    if inner is not None:
        check_guide(inner, classifier)
        return
    explained, root = root_module(guide.forward_func), root_module(classifier)
    if explained is not None and explained is not root:
        raise ArgumentError(
            f"`guide` {guide.get_name()} explains another model ({type(explained).__name__}) than "
            f"the `classifier`: make it with this one.",
            "guide",
        )
    layers = getattr(guide, "layer", None)
    layers = layers if isinstance(layers, list | tuple) else [layers]
    modules = set() if root is None else set(root.modules())
    for layer in layers:
        if isinstance(layer, Module) and root is not None and layer not in modules:
            raise ArgumentError(
                f"`guide` {guide.get_name()} is at a layer ({type(layer).__name__}) that is not in "
                f"the `classifier`: take the layer of this one.",
                "guide",
            )
