"""Coarse maps from any attribution, as an F-CAM decoder is taught by."""

from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.nn import Module

from captum_ext._engine.modules import Forward, root_module
from captum_ext.attr._chain import wrapped_method
from captum_ext.imaging import min_max, one_channel, resize


def guidance(
    guide: Attribution,
    images: Tensor,
    target: Tensor,
    size: tuple[int, int] | None = None,
    *,
    rectify: bool = True,
    **kwargs: Any,
) -> Tensor:
    """The map of each image's own label, in [0, 1].

    Channels are summed (of equal ones, as the wrappers give them, one is taken), negative values
    are set to 0, and the map is brought to [0, 1] at its own resolution and then resized
    bilinearly. What is flat or not finite becomes zeros, and teaches nothing.

    Args:
        guide: gives (N, C, h, w), or a tuple whose first entry is that.
        images: (N, C, H, W), as the classifier takes them.
        target: (N,), int64.
        size: (H, W) of the maps; None leaves them as they are.
        rectify: whether negative values become 0. The authors do that for all methods but CAM.
        **kwargs: of the guide's `attribute`.

    Returns:
        (N, 1, H, W), without a graph.

    Raises:
        ValueError: a guide whose maps do not have two spatial dimensions, or are of one pixel.
    """
    found = guide.attribute(images, target=target, **kwargs)
    found = found[0] if isinstance(found, tuple) else found
    if not isinstance(found, Tensor) or found.dim() != 4 or len(found) != len(images):
        shown = tuple(found.shape) if isinstance(found, Tensor) else type(found)
        raise ValueError(
            f"`guide` must give a map (N, C, h, w) of each image, and {guide.get_name()} gives "
            f"{shown}: choose a layer with maps, or a `reshape_transform`."
        )
    if found.shape[2:].numel() == 1:
        raise ValueError(
            f"`guide` {guide.get_name()} gives maps of a single pixel: choose a layer in front of "
            f"it, or larger pictures."
        )
    maps = one_channel(found.detach())
    maps = torch.where(torch.isfinite(maps).flatten(1).all(1)[:, None, None, None], maps, 0)
    maps = min_max(maps.clamp(min=0) if rectify else maps)
    return maps if size is None else resize(maps, size)


def check_guide(guide: Any, classifier: Forward) -> None:
    """Raise an error unless `guide` is an attribution of the classifier.

    Raises:
        TypeError: no attribution.
        ValueError: one of another model, or at another model's layer.
    """
    if not isinstance(guide, Attribution):
        raise TypeError(f"`guide` must be a Captum Attribution, got {type(guide)}.")
    inner = wrapped_method(guide)
    if inner is not None:
        check_guide(inner, classifier)
        return
    explained, root = root_module(guide.forward_func), root_module(classifier)
    if explained is not None and explained is not root:
        raise ValueError(
            f"`guide` {guide.get_name()} explains another model ({type(explained).__name__}) than "
            f"the `classifier`: make it with this one."
        )
    layers = getattr(guide, "layer", None)
    layers = layers if isinstance(layers, list | tuple) else [layers]
    own = set() if root is None else set(root.modules())
    for layer in layers:
        if isinstance(layer, Module) and root is not None and layer not in own:
            raise ValueError(
                f"`guide` {guide.get_name()} is at a layer ({type(layer).__name__}) that is not in "
                f"the `classifier`: take the layer of this one."
            )
