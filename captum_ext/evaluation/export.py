"""CSV files to read in other programs, spreadsheets among them."""

import csv
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from captum_ext._identity import atomic_write

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?|[+-]?(inf|nan)", re.ASCII)
# Spreadsheets take such a cell for a formula, which may start programs.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


@contextmanager
def csv_writer(file: Path) -> Iterator["RowWriter"]:
    """A writer of rows. Its file replaces the older one at the end, and not if writing fails."""
    errors = "backslashreplace"  # the name of a picture's file need not be text
    with (
        atomic_write(file) as unfinished,
        unfinished.open("w", encoding="utf-8", errors=errors, newline="") as lines,
    ):
        yield RowWriter(csv.writer(lines, lineterminator="\n"))


class RowWriter:
    """Writes rows of cells that no spreadsheet takes for formulas.

    Args:
        writer: of the `csv` module.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(self, row: Iterable[Any]) -> None:
        self.writer.writerow([escape_cell(cell) for cell in row])


def escape_cell(cell: Any) -> Any:
    """The cell, with an apostrophe in front of a text that begins with =, +, -, @, a tab or CR.

    Numbers stay as they are. A text that begins with apostrophes and one of these gets another
    one, so that `unescape_cell` is exact.

    Example:
        >>> escape_cell("=SUM(A1)"), escape_cell("-1.5"), escape_cell("Grad-CAM")
        ("'=SUM(A1)", '-1.5', 'Grad-CAM')
    """
    if not isinstance(cell, str) or _NUMBER.fullmatch(cell) or not _FORMULA.match(cell):
        return cell
    return f"'{cell}"


def unescape_cell(cell: str) -> str:
    """The text that `escape_cell` made a cell of.

    Example:
        >>> unescape_cell("'=SUM(A1)"), unescape_cell("'quoted'")
        ('=SUM(A1)', "'quoted'")
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
