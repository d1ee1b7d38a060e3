"""More attribution methods and metrics for Captum, under Captum's own API."""

import importlib
from types import ModuleType

__version__ = "0.1.0"

_SUBPACKAGES = (
    "attr",
    "cli",
    "datasets",
    "demo",
    "evaluation",
    "features",
    "fcam",
    "gallery",
    "imaging",
    "infill",
    "metrics",
    "perception",
    "tta",
    "zoo",
)

__all__ = ["__version__", *_SUBPACKAGES]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
