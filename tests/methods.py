"""The layer methods under test, by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from captum_ext.attr import (
    LayerAblationCam,
    LayerCam,
    LayerClassActivationMap,
    LayerEigenCam,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerHiResCam,
    LayerScoreCam,
    LayerSharpenFocus,
    LayerSmoothGradCamPlusPlus,
    LayerTokenGradCam,
    LayerXGradCam,
)

Method = Callable[..., Any]


def smooth(forward_func: Any, layer: Any, device_ids: Any = None, **options: Any) -> Any:
    """Smooth Grad-CAM++ with three samples and a generator of its own, new for each object."""
    generator = torch.Generator().manual_seed(0)
    options = {"n_samples": 3, "generator": generator, **options}
    return LayerSmoothGradCamPlusPlus(forward_func, layer, device_ids, **options)


GRADIENT: dict[str, Method] = {
    "Grad-CAM": LayerTokenGradCam,
    "Grad-CAM++": LayerGradCamPlusPlus,
    "Smooth Grad-CAM++": smooth,
    "XGrad-CAM": LayerXGradCam,
    "LayerCAM": LayerCam,
    "Sharpen Focus": LayerSharpenFocus,
    "HiResCAM": LayerHiResCam,
}
MASKING: dict[str, Method] = {
    "Score-CAM": LayerScoreCam,
    "Score-CAM increase": partial(LayerScoreCam, score="softmax", weighting="increase"),
    "Group-CAM": partial(LayerGroupCam, groups=3),
    "Ablation-CAM": LayerAblationCam,
}
OTHER: dict[str, Method] = {"CAM": LayerClassActivationMap, "Eigen-CAM": LayerEigenCam}
EVERY = GRADIENT | MASKING | OTHER
NEEDS_GRADIENTS = {*GRADIENT, "Group-CAM"}
