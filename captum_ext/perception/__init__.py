"""Perception Visualization: an attribution's map, filled with the picture that a classifier sees.

Training needs Lightning, which the extra `train` installs: `pip install "captum_ext[train]"`.
"""

from typing import TYPE_CHECKING, Any

from captum_ext._lazy import import_lazily
from captum_ext.perception.decoder import PerceptionDecoder
from captum_ext.perception.encoder import LayerEncoder
from captum_ext.perception.losses import deep_similarity, perception_loss, structural_similarity
from captum_ext.perception.visualization import Perception, PerceptionVisualization, composite

if TYPE_CHECKING:
    from captum_ext.perception.training import PerceptionModule, fit_perception

# Lightning is imported where it is used.
_LAZY = {
    "PerceptionModule": "captum_ext.perception.training",
    "fit_perception": "captum_ext.perception.training",
}

__all__ = [
    "LayerEncoder",
    "Perception",
    "PerceptionDecoder",
    "PerceptionModule",
    "PerceptionVisualization",
    "composite",
    "deep_similarity",
    "fit_perception",
    "perception_loss",
    "structural_similarity",
]

if not TYPE_CHECKING:  # for a type checker, unknown names stay errors

    def __getattr__(name: str) -> Any:
        return import_lazily(__name__, _LAZY, name)
