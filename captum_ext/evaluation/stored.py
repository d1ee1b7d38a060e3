"""Checks of the files in a run's folder, before anything is allocated for their values."""

import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from captum_ext._checks import first_line, is_finite
from captum_ext._errors import ArgumentError
from captum_ext._identity import check_can_be_file
from captum_ext._repr import bounded_repr

_MAX_BYTES = 2**24  # of the settings
_MAX_EXAMPLES = 10**8

# The settings that results are read by, and what they must be.
_NEEDED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "examples": (f"a number from 1 to {_MAX_EXAMPLES}", lambda n: _is_count(n, _MAX_EXAMPLES)),
    "methods": (
        "an object with a member for each method",
        lambda v: isinstance(v, dict) and len(v) > 0,
    ),
    "metrics": ("an object of objects", lambda v: _maps_to(v, dict)),
    "columns": ("an object of lists of names", lambda v: _maps_to(v, list) and _all_names(v)),
}


def read_settings(file: Path, format_: int) -> dict[str, Any]:
    """The settings in a file.

    Raises:
        ValueError: another format, a file that is damaged or too large, a wrong entry.
    """
    try:
        with file.open("rb") as content:
            text = content.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError(f"expected an object, got {bounded_repr(settings)}")
    except (ValueError, RecursionError) as error:
        raise damage_error(file, first_line(error)) from error
    stored = settings.get("format")
    if stored != format_:
        raise ArgumentError(
            f"`output` {file.parent} has a run of format {bounded_repr(stored)}, written by "
            f"another version; this version reads and writes format {format_}. Name another folder."
        )
    for name, (allowed, is_valid) in _NEEDED.items():
        if not is_valid(settings.get(name)):
            got = bounded_repr(settings.get(name))
            raise damage_error(file, f"{name!r} must be {allowed}, got {got}")
    return settings


def damage_error(file: Path, reason: str) -> ArgumentError:
    """The error for a file of settings that cannot be used."""
    return ArgumentError(f"`output`: {file} is damaged ({reason}). Name another folder.")


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _maps_to(value: Any, cls: type) -> bool:
    return isinstance(value, dict) and all(isinstance(inner, cls) for inner in value.values())


def _all_names(columns: dict[str, list[Any]]) -> bool:
    return all(isinstance(name, str) for names in columns.values() for name in names)


def check_result(values: Sequence[Any]) -> None:
    """Raise a ValueError unless a line of the table of results has values of the right types."""
    number, images, failures, attribution_s, metrics_s, device, rows = values
    counts = (number, images, failures)
    if not all(type(value) is int and value >= 0 for value in counts):
        raise ValueError(f"expected counts, got {bounded_repr(counts)}")
    if not is_finite(attribution_s) or not is_finite(metrics_s):
        raise ValueError(f"expected seconds, got {bounded_repr((attribution_s, metrics_s))}")
    if not isinstance(device, str) or not isinstance(rows, str):
        raise ValueError(f"expected texts, got {bounded_repr((device, rows))}")


def read_rows(text: str, columns: Sequence[str], method: str, n_examples: int) -> list[list[str]]:
    """The rows of a task, each a list with a cell for each column.

    Raises:
        ValueError: other rows than a run of these settings writes.
    """
    try:
        rows = json.loads(text)
    except RecursionError as error:
        raise ValueError("the rows are nested too deep") from error
    if not isinstance(rows, list):
        raise ValueError(f"expected rows, got {bounded_repr(rows)}")
    for row in rows:
        if not isinstance(row, list) or not all(isinstance(cell, str) for cell in row):
            raise ValueError(f"expected rows of texts, got {bounded_repr(row)}")
        if len(row) != len(columns):
            raise ValueError(f"expected rows of {len(columns)} cells, got {len(row)}")
        cells = dict(zip(columns, row, strict=True))
        index = cells["index"]
        if not index.isdecimal() or len(index) > 9 or int(index) >= n_examples:
            raise ValueError(f"expected examples below {n_examples}, got {bounded_repr(index)}")
        if cells["method"] != method:
            raise ValueError(f"expected rows of {method!r}, got {bounded_repr(cells['method'])}")
    return rows


def check_schema(connection: sqlite3.Connection, table: str) -> None:
    """Raise an error if a file of results has another table than ours, or more than it.

    Views, triggers and computed columns would run code of the file, which may need any time and
    memory.

    Args:
        connection: to the file.
        table: the statement that made our table.

    Raises:
        sqlite3.DatabaseError: there is anything else.
    """
    objects = connection.execute("SELECT type, name, sql FROM sqlite_master LIMIT 2").fetchall()
    if objects not in ([], [("table", "results", table)]):
        raise sqlite3.DatabaseError(f"expected our table, got {bounded_repr(objects)}")


def check_no_links(folder: Path) -> None:
    """Raise an ArgumentError if a file of the folder that a run writes is a symbolic link."""
    names = ("settings.json", "rows.csv", "timings.csv", "summary.md", "figure.png", "curves.png")
    for file in (*folder.glob("results.*"), *(folder / name for name in names)):
        try:
            check_can_be_file(file)
        except ValueError as error:
            raise ArgumentError(f"`output`: {error}.", "output") from error
