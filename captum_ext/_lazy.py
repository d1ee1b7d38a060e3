"""Lazy imports of the names whose modules need Lightning."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def import_lazily(package: str, modules: Mapping[str, str], name: str) -> Any:
    """The attribute `name` of a package, for the package's `__getattr__`.

    Args:
        package: the name of the package, for the error.
        modules: the module that defines each lazy name.
        name: the attribute.

    Raises:
        AttributeError: `name` is not in `modules`.
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
