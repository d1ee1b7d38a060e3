"""What the command line says and writes."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def say(kind: str, text: str) -> None:
    """One line on stderr; a `kind` is "note", "error" or "stopped"."""
    print(f"captum-ext: {kind}: {' '.join(text.split())}", file=sys.stderr)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, in columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def check_output(
    output: Path, image: str | None = None, endings: tuple[str, ...] = (".png",)
) -> None:
    """Refuse, before anything is computed, an output that could not be written.

    Raises:
        InputError: another ending, no folder, a folder that is not writable, or the image itself.
    """
    from captum_ext._errors import InputError

    folder = output.parent
    if output.suffix.lower() not in endings:
        raise InputError(
            f"the output {str(output)!r} must have a name that ends in {' or '.join(endings)}"
        )
    if not folder.is_dir():
        raise InputError(f"the output folder {str(folder)!r} does not exist: make it first")
    if output.is_dir():
        raise InputError(f"the output {str(output)!r} is a folder: give the name of a file")
    if image is not None and output.exists() and Path(image).exists() and output.samefile(image):
        raise InputError(f"the output {str(output)!r} is the image itself: give another name")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"the output folder {str(folder)!r} is not writable ({error.strerror}): give another"
        ) from error


def check_folder(output: Path) -> None:
    """Refuse, before anything is computed, a folder that files could not be written to.

    Raises:
        InputError: a file, nothing to make it in, or a folder that is not writable.
    """
    from captum_ext._errors import InputError

    if output.exists() and not output.is_dir():
        raise InputError(f"the output {str(output)!r} is a file: give a folder")
    above = output if output.is_dir() else output.parent
    if not above.is_dir():
        raise InputError(f"the output folder {str(above)!r} does not exist: make it first")
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise InputError(
            f"the output folder {str(above)!r} is not writable ({error.strerror}): give another"
        ) from error
