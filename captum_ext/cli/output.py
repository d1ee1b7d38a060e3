"""Lines, tables and files that the commands write."""

import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_LONGEST_LINE = 4000  # characters


def say(level: str, text: str) -> None:
    """Print one line on stderr; the level is "note", "error" or "stopped".

    A line that quotes a large file is cut.
    """
    line = " ".join(text.split())
    line = line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."
    print(f"captum-ext: {level}: {line}", file=sys.stderr)


@contextmanager
def collected_warnings(*ignored: str) -> Iterator[list[str]]:
    """Hide all warnings, and collect those of this package, each once, for notes.

    Args:
        ignored: patterns of messages that are not collected.
    """
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module="captum_ext|__main__")
        for pattern in ignored:
            warnings.filterwarnings("ignore", message=pattern)
        yield notes
        notes += dict.fromkeys(str(warning.message) for warning in caught)


def message_with_flags(error: Exception, flags: Mapping[str, str]) -> str:
    """The message of an error of the library, with flags for the arguments in it.

    Args:
        error: names arguments in backticks.
        flags: for an argument's name, the flag of the command line.
    """
    message = str(error)
    for argument, flag in flags.items():
        message = message.replace(f"`{argument}`", flag)
    return message


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, in aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def check_output_file(
    output: Path, image: str | None = None, endings: tuple[str, ...] = (".png",)
) -> None:
    """Raise an error, before anything is computed, unless the output file can be written.

    Raises:
        InputError: another ending, no folder, a folder that is not writable, the image itself, a
            symbolic link, a device or a pipe.
    """
    from captum_ext._errors import InputError

    folder = output.parent
    if output.suffix.lower() not in endings:
        raise InputError(
            f"the output {str(output)!r} must have a name that ends in {' or '.join(endings)}"
        )
    _check_writable(folder)
    if output.is_symlink() or (output.exists() and not output.is_file()):
        from captum_ext._identity import check_can_be_file  # with torch

        check_can_be_file(output)
    if image is not None and output.exists() and Path(image).exists() and output.samefile(image):
        raise InputError(f"the output {str(output)!r} is the image itself: give another name")


def check_output_folder(output: Path) -> None:
    """Raise an error, before anything is computed, unless files can be written to the folder.

    Raises:
        InputError: a file, no folder to make it in, or a folder that is not writable.
    """
    from captum_ext._errors import InputError

    if output.exists() and not output.is_dir():
        raise InputError(f"the output {str(output)!r} is a file: give a folder")
    _check_writable(output if output.is_dir() else output.parent)


def _check_writable(folder: Path) -> None:
    from captum_ext._errors import InputError

    if not folder.is_dir():
        raise InputError(f"the output folder {str(folder)!r} does not exist: make it first")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"the output folder {str(folder)!r} is not writable ({error.strerror}): give another"
        ) from error
