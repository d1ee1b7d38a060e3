"""A file of settings in YAML, each under the name of its flag."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_config(
    file: str, options: Sequence[argparse.Action], mappings: Collection[str] = ()
) -> dict[str, Any]:
    """The settings in a file, by the names that argparse has for the options.

    Values are checked as argparse checks those of the command line, and paths start in the working
    folder, too. Keys without a value are ignored.

    Args:
        file: the name of the file.
        options: the options of the command, as `add_argument` returned them.
        mappings: names of options that may be a mapping from names to options of their own.

    Raises:
        InputError: the file is no mapping in YAML, or has an unknown key or an invalid value.
    """
    import yaml

    from captum_ext._checks import closest
    from captum_ext._errors import InputError

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {file} is not YAML: {error}") from error
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise InputError(f"--config {file} must have lines `flag: value`, got {content!r}")
    known = {(o.option_strings or [o.dest])[0].lstrip("-"): o for o in options}
    settings = {}
    for key, value in content.items():
        if key not in known:
            raise InputError(
                f"--config {file}: unknown key {key!r}. Closest: {closest(str(key), list(known))}"
            )
        option = known[key]
        if value is None or (isinstance(value, Mapping) and value and key in mappings):
            settings[option.dest] = value
            continue
        try:
            settings[option.dest] = _checked(option, value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise InputError(f"--config {file}: {key}: {error}") from error
    return {name: value for name, value in settings.items() if value is not None}


def _checked(option: argparse.Action, value: Any) -> Any:
    """The value of an option, checked.

    Raises:
        ValueError: a value of another type, or none of the choices.
        argparse.ArgumentTypeError: an integer out of range.
    """
    if option.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {value!r}")
        return value
    if option.nargs == "+":
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str) for item in items):
            raise ValueError(f"expected one or more names, got {value!r}")
        return items
    if option.type is not None:  # all types of our options are integers
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"expected an integer, got {value!r}")
        return option.type(str(value))  # type: ignore[operator]
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r}")
    if option.choices is not None and value not in option.choices:
        raise ValueError(f"expected one of {', '.join(option.choices)}, got {value!r}")
    return value
