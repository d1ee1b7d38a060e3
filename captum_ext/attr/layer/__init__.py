"""Layer class activation maps: one file for each method, over the base classes in `base`.

Each import below makes a name public, here and in `captum_ext.attr`; the command line, the tables
and the tests read the rest from the classes.
"""

from typing import TYPE_CHECKING, Any

from captum_ext._deprecation import old_name
from captum_ext.attr.layer.ablation_cam import LayerAblationCam as LayerAblationCam
from captum_ext.attr.layer.base import BaseGradientCam as BaseGradientCam
from captum_ext.attr.layer.base import BaseLayerCam as BaseLayerCam
from captum_ext.attr.layer.class_activation_map import (
    LayerClassActivationMap as LayerClassActivationMap,
)
from captum_ext.attr.layer.eigen_cam import LayerEigenCam as LayerEigenCam
from captum_ext.attr.layer.eigen_grad_cam import LayerEigenGradCam as LayerEigenGradCam
from captum_ext.attr.layer.grad_cam_plus_plus import LayerGradCamPlusPlus as LayerGradCamPlusPlus
from captum_ext.attr.layer.group_cam import LayerGroupCam as LayerGroupCam
from captum_ext.attr.layer.hires_cam import LayerHiResCam as LayerHiResCam
from captum_ext.attr.layer.layer_cam import LayerCam as LayerCam
from captum_ext.attr.layer.reshape import channels_last_to_first as channels_last_to_first
from captum_ext.attr.layer.reshape import tokens_to_grid as tokens_to_grid
from captum_ext.attr.layer.score_cam import LayerScoreCam as LayerScoreCam
from captum_ext.attr.layer.sharpen_focus import LayerSharpenFocus as LayerSharpenFocus
from captum_ext.attr.layer.smooth_grad_cam_plus_plus import (
    LayerSmoothGradCamPlusPlus as LayerSmoothGradCamPlusPlus,
)
from captum_ext.attr.layer.suggest import suggest_layer as suggest_layer
from captum_ext.attr.layer.suggest import suggest_reshape_transform as suggest_reshape_transform
from captum_ext.attr.layer.token_grad_cam import LayerTokenGradCam as LayerTokenGradCam
from captum_ext.attr.layer.x_grad_cam import LayerXGradCam as LayerXGradCam

if not TYPE_CHECKING:  # a type checker reads the imports; for it, unknown names stay errors
    __all__ = sorted(
        name
        for name, value in globals().items()
        if getattr(value, "__module__", "").startswith(__name__)
    )

    OLD_NAMES = {"GradientCam": "BaseGradientCam", "LayerMap": "BaseLayerCam"}

    def __getattr__(name: str) -> Any:
        return old_name(__name__, OLD_NAMES, name)
