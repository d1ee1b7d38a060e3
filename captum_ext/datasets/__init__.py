"""Pictures as `Example`: seeded sets whose objects are known to the pixel, and public layouts.

Nothing is downloaded. Each data set knows the `name` and the `target` of its entry i before it
draws or reads the picture.

`PastedScenes` needs scikit-image's photographs, which the extra `demo` installs:
`pip install "captum_ext[demo]"`.
"""

from captum_ext.datasets.classifiers import SmallCNN, TinyCNN, train_classifier
from captum_ext.datasets.coco import Coco
from captum_ext.datasets.cub import Cub
from captum_ext.datasets.examples import Example, is_difficult
from captum_ext.datasets.fine_grained import PATTERNS, Batch, FineGrainedParts, Specimen
from captum_ext.datasets.folders import ClassFolders
from captum_ext.datasets.pasted_scenes import KINDS, PastedScenes, Scene
from captum_ext.datasets.textured_ellipses import (
    CUES,
    TEXTURES,
    EllipseBatch,
    EllipseScene,
    TexturedEllipses,
)
from captum_ext.datasets.voc import VOC_CLASSES, Voc, VocExample
from captum_ext.datasets.wsol import WsolFolder

__all__ = [
    "CUES",
    "KINDS",
    "PATTERNS",
    "TEXTURES",
    "VOC_CLASSES",
    "Batch",
    "ClassFolders",
    "Coco",
    "Cub",
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
    "Voc",
    "VocExample",
    "WsolFolder",
    "is_difficult",
    "train_classifier",
]
