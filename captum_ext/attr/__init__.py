"""Attribution methods and wrappers, all of them Captum `Attribution` classes."""

from captum_ext.attr.fcam import FCAM
from captum_ext.attr.fido import FIDO, FIDOMasks
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
    LayerTokenGradCam,
    LayerXGradCam,
    channels_last_to_first,
    suggest_layer,
    suggest_reshape_transform,
    tokens_to_grid,
)
from captum_ext.attr.rise import RISE, RISEMaps
from captum_ext.attr.wrappers import AugmentedSR, SESSWrapper, UpsampleWrapper

__all__ = [
    "FCAM",
    "FIDO",
    "RISE",
    "AugmentedSR",
    "FIDOMasks",
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
    "LayerTokenGradCam",
    "LayerXGradCam",
    "RISEMaps",
    "SESSWrapper",
    "UpsampleWrapper",
    "channels_last_to_first",
    "suggest_layer",
    "suggest_reshape_transform",
    "tokens_to_grid",
]
