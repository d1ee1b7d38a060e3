"""Names whose modules need Lightning, imported where they are used."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def from_training(package: str, modules: Mapping[str, str], name: str) -> Any:
    """What a package's `__getattr__` gives for a name.

    Raises:
        AttributeError: it is not one of these names.
        ImportError: Lightning is not installed.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    try:
        return getattr(import_module(modules[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "lightning":
            raise
        raise ImportError(f'`{name}` needs Lightning: pip install "captum_ext[train]".') from error
