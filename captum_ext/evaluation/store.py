"""The files of a run: what is finished is on disk, whole or not at all.

A folder has

- `settings.json`: of what the rows are;
- `rows.csv`, and `rows.1.csv`, ... of further processes: a line for each image and method;
- `timings.csv`, likewise: a line for each batch and method. It differs from run to run;
- `rows.csv.lock`, likewise: empty, and locked while a process writes.

Rows come a unit at a time, which is a batch of images explained by one method. Only whole units
count; what is behind the last of them, a line that was torn or a unit that was not finished, is cut
off by the process that goes on with the file, and by nobody else.
"""

import csv
import errno
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from captum_ext._identity import atomic_write, check_same_run, describe_changes

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 2  # of the files
SETTINGS, ROWS = "settings.json", "rows.csv"
COLUMNS = ("index", "name", "method", "label", "target", "failure")  # and those of the metrics
TIMINGS = ("batch", "method", "images", "attribution_s", "metrics_s", "device")

Row = dict[str, str]


class Unit(NamedTuple):
    """A batch of images explained by one method."""

    block: int
    method: str


class Store:
    """The folder of a run.

    Args:
        folder: made if it is not there.
        settings: those of the run, in plain types: "examples", "batch_size", "methods" and
            "columns", of each metric, at least.

    Raises:
        ValueError: the folder has the rows of other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        file = self.folder / SETTINGS
        if file.is_file():
            before = json.loads(file.read_text())
            saved, found = _flat(before), _flat(self.settings)
            found |= dict.fromkeys(saved.keys() - found.keys())
            if describe_changes(saved, found):
                if not self._is_empty(before):
                    stored = f"`output` {self.folder} has the rows of another run"
                    check_same_run(stored, saved, found, argument="output")
                self._write_settings()
            else:
                self.settings = before  # in the order of its columns
        else:
            if _rows_files(self.folder):
                raise ValueError(
                    f"`output` {self.folder} has rows, but no {SETTINGS}: they are not known to be "
                    f"of this run. Name another folder."
                )
            self._write_settings()

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of all rows, and of the metrics; what several metrics share, once."""
        own = itertools.chain(*self.settings["columns"].values())
        return (*COLUMNS, *dict.fromkeys(own))

    def _write_settings(self) -> None:
        with atomic_write(self.folder / SETTINGS) as unfinished:
            unfinished.write_text(json.dumps(self.settings, indent=1) + "\n")

    def _is_empty(self, settings: Mapping[str, Any]) -> bool:
        """Whether a run of these settings finished nothing, and is not about to."""
        if settings.get("format") != FORMAT:
            return False
        before = Store.__new__(Store)
        before.folder, before.settings = self.folder, dict(settings)
        if before.done():
            return False
        _locked(self.folder / ROWS).close()
        return True

    @classmethod
    def read(cls, folder: str | Path) -> "Store":
        """That of a run which has begun.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is another version's.
        """
        if not (Path(folder) / SETTINGS).is_file():
            raise FileNotFoundError(f"`output`: there is no run in {folder}.")
        settings = json.loads((Path(folder) / SETTINGS).read_text())
        if settings.get("format") != FORMAT:
            raise ValueError(
                f"`output` {folder} has rows of format {settings.get('format')}, and this version "
                f"reads {FORMAT}."
            )
        return cls(folder, settings)

    def rows(self) -> Iterator[Row]:
        """Those of all whole units, each once."""
        seen: set[Unit] = set()
        for file in _rows_files(self.folder):
            for unit, rows, _ in self._units(file):
                if unit not in seen:
                    seen.add(unit)
                    yield from rows

    def done(self) -> set[Unit]:
        """The units that are whole."""
        files = _rows_files(self.folder)
        return {unit for file in files for unit, _, _ in self._units(file)}

    def size(self, block: int) -> int:
        """How many images a batch has."""
        start = block * self.settings["batch_size"]
        return int(min(self.settings["batch_size"], self.settings["examples"] - start))

    def _units(self, file: Path) -> Iterator[tuple[Unit, list[Row], int]]:
        """The whole units of a file, and where each ends."""
        with file.open("rb") as lines:
            end = 0
            rows: list[Row] = []
            for line in lines:
                end += len(line)
                cells = _cells(line)
                if cells is None or len(cells) != len(self.columns) or not cells[0].isdecimal():
                    rows = []
                    continue
                row = dict(zip(self.columns, cells, strict=True))
                block, place = divmod(int(row["index"]), self.settings["batch_size"])
                if place == 0:
                    rows = []
                elif len(rows) != place or not _is_next(rows[-1], row):
                    rows = []
                    continue
                rows.append(row)
                if len(rows) == self.size(block) and row["method"] in self.settings["methods"]:
                    yield Unit(block, row["method"]), rows, end
                    rows = []


def _is_next(before: Row, row: Row) -> bool:
    follows = int(before["index"]) + 1 == int(row["index"])
    return follows and before["method"] == row["method"]


class Writer:
    """One process's files, cut off behind their last whole unit and gone on with."""

    def __init__(self, store: Store, rank: int) -> None:
        suffix = ".csv" if rank == 0 else f".{rank}.csv"
        self.columns = store.columns
        rows, timings = (store.folder / f"{name}{suffix}" for name in ("rows", "timings"))
        self.lock = _locked(rows)
        ends = [end for _, _, end in store._units(rows)] if rows.is_file() else []
        self.rows = _opened(rows, ends[-1] if ends else 0, self.columns)
        whole = timings.read_bytes() if timings.is_file() else b""
        self.timings = _opened(timings, whole.rfind(b"\n") + 1, TIMINGS)

    def write(self, rows: Sequence[Mapping[str, Any]], timing: Sequence[Any]) -> None:
        """A unit. Its time is written first: it may come twice, but it is never missing."""
        self.timings.write(_line(timing))
        self.timings.flush()
        lines = [_line([row.get(column, "") for column in self.columns]) for row in rows]
        self.rows.write(b"".join(lines))
        self.rows.flush()

    def close(self) -> None:
        self.rows.close()
        self.timings.close()
        self.lock.close()


def timings(folder: str | Path) -> dict[str, tuple[float, float]]:
    """Seconds per image of each method: of the attribution, and of the metrics."""
    last: dict[tuple[str, str], tuple[int, float, float]] = {}
    for file in sorted(Path(folder).glob("timings*.csv")):
        for line in file.read_bytes().splitlines(keepends=True)[1:]:
            cells = _cells(line)
            if cells is not None and len(cells) == len(TIMINGS):
                last[cells[0], cells[1]] = (int(cells[2]), float(cells[3]), float(cells[4]))
    found: dict[str, tuple[float, float]] = {}
    for method in dict.fromkeys(method for _, method in last):
        each = [value for (_, name), value in last.items() if name == method]
        images = max(sum(n for n, _, _ in each), 1)
        found[method] = (sum(a for _, a, _ in each) / images, sum(m for _, _, m in each) / images)
    return found


def _rows_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows*.csv"))


def _opened(file: Path, end: int, columns: Sequence[str]) -> io.BufferedWriter:
    """A file to append to, no longer than its first `end` bytes."""
    opened = file.open("ab")
    opened.truncate(end)
    if end == 0:
        opened.write(_line(columns))
        opened.flush()
    return opened


def _locked(file: Path) -> io.BufferedWriter:
    """What keeps other processes from writing to a file, until it is closed or the process ends.

    A file of its own: a lock falls when its process closes the file anywhere, as readers of rows
    do. Where files cannot be locked, nothing is kept.
    """
    opened = file.with_name(f"{file.name}.lock").open("ab")
    if fcntl is not None:
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                opened.close()
                raise RuntimeError(f"`output`: another process is writing to {file}.") from None
    return opened


def _line(cells: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([_one_line(cell) for cell in cells])
    return text.getvalue().encode(errors="backslashreplace")  # a file's name may be no text at all


def _one_line(cell: Any) -> str:
    return " ".join(str(cell).splitlines())


def _cells(line: bytes) -> list[str] | None:
    """None for a line that was cut off."""
    if not line.endswith(b"\n"):
        return None
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(line)))  # a curve of each pixel is longer
    try:
        return next(csv.reader([line.decode()], strict=True))
    except (UnicodeDecodeError, csv.Error, StopIteration):
        return None
    finally:
        csv.field_size_limit(limit)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One level deep, so that what differs is named by itself."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}: {key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat
