"""F-CAM (Belharbi et al. 2022): full-resolution maps from a decoder on a frozen classifier.

Training needs Lightning, which the extra `train` installs: `pip install "captum_ext[train]"`.
"""

from typing import TYPE_CHECKING, Any

from captum_ext._deprecation import old_name
from captum_ext._lazy import import_lazily
from captum_ext.fcam.attribution import FCAM
from captum_ext.fcam.crf import DenseCRFLoss, LocalCRFLoss, dense_crf_loss, local_crf_loss
from captum_ext.fcam.decoder import FCAMDecoder, find_feature_layers
from captum_ext.fcam.losses import SizeLoss, log_barrier, partial_cross_entropy, size_loss
from captum_ext.fcam.seeding import SeedSampler, otsu

if TYPE_CHECKING:
    from captum_ext.fcam.fit import PAPER, fit_fcam
    from captum_ext.fcam.training import FCAMModule

# Lightning is imported where it is used, and not with the attributions.
_LAZY = {
    "PAPER": "captum_ext.fcam.fit",
    "fit_fcam": "captum_ext.fcam.fit",
    "FCAMModule": "captum_ext.fcam.training",
}

__all__ = [
    "FCAM",
    "PAPER",
    "DenseCRFLoss",
    "FCAMDecoder",
    "FCAMModule",
    "LocalCRFLoss",
    "SeedSampler",
    "SizeLoss",
    "dense_crf_loss",
    "find_feature_layers",
    "fit_fcam",
    "local_crf_loss",
    "log_barrier",
    "otsu",
    "partial_cross_entropy",
    "size_loss",
]

if not TYPE_CHECKING:  # for a type checker, unknown names stay errors

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return import_lazily(__name__, _LAZY, name)
        return old_name(__name__, {"find_taps": "find_feature_layers"}, name)
