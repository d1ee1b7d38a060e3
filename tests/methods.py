"""The layer methods under test, by name."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import captum_ext.attr
from captum_ext.attr import (
    BaseLayerCam,
    LayerGroupCam,
    LayerScoreCam,
    LayerSmoothGradCamPlusPlus,
)

Method = Callable[..., Any]


def smooth(forward_func: Any, layer: Any, device_ids: Any = None, **options: Any) -> Any:
    """Smooth Grad-CAM++ with three samples and a generator of its own, new for each object."""
    generator = torch.Generator().manual_seed(0)
    options = {"n_samples": 3, "generator": generator, **options}
    return LayerSmoothGradCamPlusPlus(forward_func, layer, device_ids, **options)


CLASSES = {
    cls.title: cls
    for cls in (getattr(captum_ext.attr, name) for name in captum_ext.attr.__all__)
    if inspect.isclass(cls) and issubclass(cls, BaseLayerCam) and hasattr(cls, "title")
}
METHODS: dict[str, Method] = {
    **CLASSES,
    "Smooth Grad-CAM++": smooth,
    "Score-CAM increase": partial(LayerScoreCam, score="softmax", weighting="increase"),
    "Group-CAM": partial(LayerGroupCam, groups=3),
}
CLASSES["Score-CAM increase"] = LayerScoreCam
GRADIENT = {name: method for name, method in METHODS.items() if CLASSES[name].family == "gradient"}
MASKING = {name: method for name, method in METHODS.items() if CLASSES[name].family == "masking"}
OTHER = {name: method for name, method in METHODS.items() if CLASSES[name].family == "activation"}
NEEDS_GRADIENTS = {name for name in METHODS if CLASSES[name].needs_gradients}
