"""Data sets of `Example`: seeded pictures with exact masks, and layouts of public data sets.

Nothing is downloaded. Each data set knows the `name` and the `target` of example i before it draws
or reads the picture.

`PastedScenes` needs scikit-image's photographs, which the extra `demo` installs:
`pip install "captum_ext[demo]"`.
"""

from typing import Any

from captum_ext._deprecation import old_name
from captum_ext.datasets.classifiers import SmallCNN, TinyCNN, train_classifier
from captum_ext.datasets.coco import Coco
from captum_ext.datasets.cub import Cub
from captum_ext.datasets.examples import Example, is_difficult
from captum_ext.datasets.fine_grained import (
    PATTERNS,
    BeetleBatch,
    BeetleExample,
    FineGrainedParts,
)
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
    "BeetleBatch",
    "BeetleExample",
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
    "TexturedEllipses",
    "TinyCNN",
    "Voc",
    "VocExample",
    "WsolFolder",
    "is_difficult",
    "train_classifier",
]


def __getattr__(name: str) -> Any:
    new_names = {"Specimen": "BeetleExample", "Batch": "BeetleBatch"}
    return old_name(__name__, new_names, name)
