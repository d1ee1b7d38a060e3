"""Attribution methods and wrappers, all of them Captum `Attribution` classes."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from captum_ext.fcam.attribution import FCAM

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

if not TYPE_CHECKING:  # for a type checker, unknown names stay errors

    def __getattr__(name: str) -> Any:
        """FCAM stands beside its decoder, which is made of what is here."""
        if name != "FCAM":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from captum_ext.fcam.attribution import FCAM

        return FCAM
