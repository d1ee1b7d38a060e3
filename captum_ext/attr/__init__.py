"""Attribution methods and wrappers, all of them Captum `Attribution` classes."""

from captum_ext.attr.layer import (
    GradientCam,
    LayerAblationCam,
    LayerCam,
    LayerClassActivationMap,
    LayerEigenCam,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerHiResCam,
    LayerMap,
    LayerScoreCam,
    LayerSharpenFocus,
    LayerSmoothGradCamPlusPlus,
    LayerXGradCam,
    channels_last_to_first,
    suggest_layer,
    suggest_reshape_transform,
    tokens_to_grid,
)
from captum_ext.attr.wrappers import UpsampleWrapper

__all__ = [
    "GradientCam",
    "LayerAblationCam",
    "LayerCam",
    "LayerClassActivationMap",
    "LayerEigenCam",
    "LayerGradCamPlusPlus",
    "LayerGroupCam",
    "LayerHiResCam",
    "LayerMap",
    "LayerScoreCam",
    "LayerSharpenFocus",
    "LayerSmoothGradCamPlusPlus",
    "LayerXGradCam",
    "UpsampleWrapper",
    "channels_last_to_first",
    "suggest_layer",
    "suggest_reshape_transform",
    "tokens_to_grid",
]
