"""Layer class activation maps: one file for each method over one template."""

from captum_ext.attr.layer.ablation_cam import LayerAblationCam
from captum_ext.attr.layer.class_activation_map import LayerClassActivationMap
from captum_ext.attr.layer.eigen_cam import LayerEigenCam
from captum_ext.attr.layer.grad_cam_plus_plus import LayerGradCamPlusPlus
from captum_ext.attr.layer.group_cam import LayerGroupCam
from captum_ext.attr.layer.hires_cam import LayerHiResCam
from captum_ext.attr.layer.layer_cam import LayerCam
from captum_ext.attr.layer.reshape import channels_last_to_first, tokens_to_grid
from captum_ext.attr.layer.score_cam import LayerScoreCam
from captum_ext.attr.layer.sharpen_focus import LayerSharpenFocus
from captum_ext.attr.layer.smooth_grad_cam_plus_plus import LayerSmoothGradCamPlusPlus
from captum_ext.attr.layer.suggest import suggest_layer, suggest_reshape_transform
from captum_ext.attr.layer.template import GradientCam, LayerMap
from captum_ext.attr.layer.token_grad_cam import LayerTokenGradCam
from captum_ext.attr.layer.x_grad_cam import LayerXGradCam

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
    "LayerTokenGradCam",
    "LayerXGradCam",
    "channels_last_to_first",
    "suggest_layer",
    "suggest_reshape_transform",
    "tokens_to_grid",
]
