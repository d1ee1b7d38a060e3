"""Old public names, which work for one minor version."""

import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def old_name(module: str, new_names: Mapping[str, str], name: str) -> Any:
    """The object that a module's old name stands for, with a DeprecationWarning.

    Args:
        module: the module that had the old name; its `__getattr__` calls this.
        new_names: for each old name the new one, in the same module or with its own
            ("captum_ext.zoo.load_model").
        name: the attribute that was asked of the module.

    Raises:
        AttributeError: not an old name.
    """
    if name not in new_names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new_module, _, new = new_names[name].rpartition(".")
    new_module = new_module or module
    warnings.warn(
        f"{module}.{name} is now {new_module}.{new}; version 0.3 drops the old name.",
        DeprecationWarning,
        stacklevel=3,
    )
    return getattr(import_module(new_module), new)


def warn_renamed(old: str, new: str) -> None:
    """Give a DeprecationWarning for the old name of an argument or attribute.

    The warning shows the line that called the caller of this function.
    """
    warnings.warn(
        f"`{old}` is now `{new}`; version 0.3 drops the old name.", DeprecationWarning, stacklevel=3
    )
