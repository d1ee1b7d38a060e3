"""Data sets whose objects or parts are known to the pixel. Nothing is downloaded.

`PastedScenes` needs scikit-image's photographs, which the extra `demo` installs:
`pip install "captum_ext[demo]"`.
"""

from captum_ext.datasets.classifiers import SmallCNN, TinyCNN, train_classifier
from captum_ext.datasets.examples import Example, is_difficult
from captum_ext.datasets.fine_grained import PATTERNS, Batch, FineGrainedParts, Specimen
from captum_ext.datasets.pasted_scenes import KINDS, PastedScenes, Scene
from captum_ext.datasets.textured_ellipses import (
    CUES,
    TEXTURES,
    EllipseBatch,
    EllipseScene,
    TexturedEllipses,
)

__all__ = [
    "CUES",
    "KINDS",
    "PATTERNS",
    "TEXTURES",
    "Batch",
    "EllipseBatch",
    "EllipseScene",
    "Example",
    "FineGrainedParts",
    "PastedScenes",
    "Scene",
    "SmallCNN",
    "Specimen",
    "TexturedEllipses",
    "TinyCNN",
    "is_difficult",
    "train_classifier",
]
