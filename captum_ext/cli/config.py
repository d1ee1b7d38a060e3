"""A file of settings in YAML, each under the name of its flag."""

import argparse
import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

_MAX_BYTES = 2**16  # of a file
_MAX_VALUES = 10_000  # in a file; an alias counts for all that it stands for
_MAX_DEPTH = 20


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
        InputError: the file is no mapping in YAML, is too large or nested too deep, or has an
            unknown key or an invalid value.
    """
    from captum_ext._checks import closest
    from captum_ext._errors import InputError
    from captum_ext._repr import bounded_repr

    content = _load(file)
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise InputError(
            f"--config {file} must have lines `flag: value`, got {bounded_repr(content)}"
        )
    known = {(o.option_strings or [o.dest])[0].lstrip("-"): o for o in options}
    settings = {}
    for key, value in content.items():
        if key not in known:
            raise InputError(
                f"--config {file}: unknown key {bounded_repr(key)}. Closest: "
                f"{closest(str(key), list(known))}"
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


def _load(file: str) -> Any:
    """The content of a file, read with bounds: nobody needs to trust it.

    Raises:
        InputError: no YAML, or beyond the bounds.
    """
    import yaml

    from captum_ext._checks import first_line
    from captum_ext._errors import InputError

    with Path(file).open("rb") as stream:
        text = stream.read(_MAX_BYTES + 1)
    bounds = f"at most {_MAX_VALUES} values, {_MAX_DEPTH} deep, in {_MAX_BYTES} bytes"
    too_large = InputError(f"--config {file} is too large or nested too deep: {bounds} are read")
    if len(text) > _MAX_BYTES:
        raise too_large
    try:
        loader = yaml.SafeLoader(text.decode("utf-8"))
        node = loader.get_single_node()
        size, depth = (0, 0) if node is None else _extent(node, {})
        if size > _MAX_VALUES or depth > _MAX_DEPTH:
            raise too_large
        return None if node is None else loader.construct_document(node)
    except InputError:
        raise
    except RecursionError as error:
        raise too_large from error
    except Exception as error:  # PyYAML raises any type for values that are none of their tag
        reason = first_line(" ".join(str(error).split()), 300)
        raise InputError(f"--config {file} is not YAML: {reason}") from error


def _extent(node: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """The number of values in a node of YAML, and their depth, before aliases are expanded.

    A node that contains itself has no end: its numbers are beyond all bounds.
    """
    if id(node) not in known:
        known[id(node)] = (_MAX_VALUES + 1, 0)
        inner = node.value if isinstance(node.value, list) else []
        children = itertools.chain(*(pair if isinstance(pair, tuple) else [pair] for pair in inner))
        extents = [_extent(child, known) for child in children]
        depth = 1 + max((depth for _, depth in extents), default=0)
        known[id(node)] = (1 + sum(size for size, _ in extents), depth)
    return known[id(node)]


def _checked(option: argparse.Action, value: Any) -> Any:
    """The value of an option, checked.

    Raises:
        ValueError: a value of another type, or none of the choices.
        argparse.ArgumentTypeError: an integer out of range.
    """
    from captum_ext._repr import bounded_repr

    if option.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {bounded_repr(value)}")
        return value
    if option.nargs == "+":
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str) for item in items):
            raise ValueError(f"expected one or more names, got {bounded_repr(value)}")
        return items
    if option.type is not None:  # all types of our options are integers
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"expected an integer, got {bounded_repr(value)}")
        return option.type(str(value))  # type: ignore[operator]
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {bounded_repr(value)}")
    if option.choices is not None and value not in option.choices:
        raise ValueError(f"expected one of {', '.join(option.choices)}, got {bounded_repr(value)}")
    return value
