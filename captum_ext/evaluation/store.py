"""The folder of a run: results in SQLite, and CSV files to read them.

A folder has

- `settings.json`: the settings that all results share;
- `results.0.sqlite`, `results.1.sqlite`, ...: one SQLite file for each process that writes;
- `results.0.lock`, ...: empty files, locked while their process writes;
- `rows.csv` and `timings.csv`: exports, written when `evaluate` ends. An apostrophe stands in front
  of texts that a spreadsheet would take for a formula; see `captum_ext.evaluation.export`.

A task is one batch of images explained by one method. Its rows are written in one transaction, so
that a task is stored as a whole or not at all, also when its process is killed. SQLite keeps a
rollback journal, which the next reader or writer plays back.

**Damage.** A task is stored with a checksum of its rows and of the run's settings. One whose
checksum does not match counts as not done: `summary` leaves it out with a warning, and `evaluate`
computes it again. A file that SQLite cannot read is an error; without that file, the tasks in it
count as not done. The files of strangers may have checksums that match: settings and rows whose
types or sizes are wrong are errors before anything is allocated for them, packed cells are unpacked
only to their size, and nothing is written through symbolic links.

**Locks.** Two writers are kept apart by a lock of the operating system, which ends with its
process: by fcntl on Linux and macOS, and by LockFileEx on Windows. SQLite takes these locks, and
keeps threads of one process apart itself. On a network file system they are worth as much as its
own locks. Where these do not reach other machines, read and write a run on one machine at a time;
a file system without locks raises an error. The processes of one run do not rely on locks: each
writes its own file, and the first one reads the others when these are closed.
"""

import heapq
import itertools
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from captum_ext._checks import first_line, warn
from captum_ext._errors import ArgumentError, FolderInUseError
from captum_ext._identity import atomic_write, check_same_run, describe_changes, digest
from captum_ext._repr import bounded_repr
from captum_ext.evaluation.export import csv_writer
from captum_ext.evaluation.stored import (
    check_no_links,
    check_result,
    check_schema,
    read_rows,
    read_settings,
)

FORMAT = 3  # of the files
SETTINGS, ROWS, TIMINGS = "settings.json", "rows.csv", "timings.csv"
COLUMNS = ("index", "name", "method", "label", "target", "failure")  # and those of the metrics
TIMING_COLUMNS = ("batch", "method", "images", "attribution_s", "metrics_s", "device")
PATIENCE = 600.0  # seconds in which a reader or a writer of the same file finishes
START = 10.0  # seconds in which another process writes the settings

# `number` orders the tasks: the batch times the number of methods, plus the method's index.
_TABLE = """CREATE TABLE results (
    number INTEGER PRIMARY KEY, images INTEGER, failures INTEGER, attribution_s REAL,
    metrics_s REAL, device TEXT, rows TEXT, checksum TEXT)"""
_INSERT = "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_NEXT = "SELECT * FROM results WHERE number > ? ORDER BY number LIMIT 1"

Row = dict[str, str]


class Task(NamedTuple):
    """A batch of images explained by one method."""

    batch: int
    method: str


class _Result(NamedTuple):
    """A finished task, as a line of the table without its checksum."""

    number: int
    images: int
    failures: int
    attribution_s: float
    metrics_s: float
    device: str
    rows: str  # JSON: a list of cells for each image


class ResultStore:
    """The stored results of a run.

    Args:
        folder: of the run.
        settings: as in `settings.json`.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings

    @classmethod
    def create(cls, folder: str | Path, settings: Mapping[str, Any]) -> "ResultStore":
        """The store of a new run, or of one that is resumed.

        Args:
            folder: created if it does not exist.
            settings: in plain types: "methods" and the "columns" of each metric, at least.

        Raises:
            ValueError: the folder has results of other settings or of another version.
            RuntimeError: the settings differ, and another process or thread is writing.
        """
        check_no_links(Path(folder))
        store = cls(Path(folder), json.loads(json.dumps(settings)))
        deadline = time.monotonic() + START
        while (stored := store._stored()) is None:
            store.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = _lock(store.folder, 0)
            except FolderInUseError:  # perhaps another process writes the same settings
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
                continue
            with closing(lock):
                if store._stored() is None:
                    with atomic_write(store.folder / SETTINGS) as unfinished:
                        unfinished.write_text(json.dumps(store.settings, indent=1) + "\n")
        return stored

    def _stored(self) -> "ResultStore | None":
        """The store of the run in this folder, if it has these settings; None if it has no results.

        Raises:
            ValueError: it has results of other settings.
        """
        if not (self.folder / SETTINGS).is_file():
            if any(_files(self.folder)) or any(self.folder.glob("rows*.csv")):
                raise ArgumentError(
                    f"`output` {self.folder} has rows, but no {SETTINGS}: they are not known to be "
                    f"of this run. Name another folder."
                )
            return None
        stored = ResultStore.read(self.folder)
        before, now = _flat(stored.settings), _flat(self.settings)
        now |= dict.fromkeys(before.keys() - now.keys())
        if not describe_changes(before, now):
            return stored  # whose columns and methods may be in another order
        if any(True for _ in stored._results(with_damaged=True)):
            check_same_run(
                f"`output` {self.folder} has the rows of another run",
                before,
                now,
                argument="output",
            )
        return None

    @classmethod
    def read(cls, folder: str | Path) -> "ResultStore":
        """The store of a run that has begun.

        Raises:
            FileNotFoundError: there is none.
            ValueError: its files are of another version, or damaged.
        """
        file = Path(folder) / SETTINGS
        if not file.is_file():
            raise FileNotFoundError(f"`output`: there is no run in {folder}.")
        return cls(Path(folder), read_settings(file, FORMAT))

    # --- reading ---------------------------------------------------------------------------------

    @property
    def methods(self) -> list[str]:
        """The names of the methods, in the order of the rows."""
        return list(self.settings["methods"])

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of all rows, then those of the metrics, without repetition."""
        of_metrics = itertools.chain(*self.settings["columns"].values())
        return (*COLUMNS, *dict.fromkeys(of_metrics))

    def finished_tasks(self) -> set[Task]:
        """The tasks whose rows are stored."""
        return {self._task(result) for result in self._results()}

    def rows(self) -> Iterator[Row]:
        """The rows of all finished tasks, ordered by batch, method and image."""
        columns = self.columns
        for result in self._results():
            for cells in self._cells(result):
                yield dict(zip(columns, cells, strict=True))

    def seconds_per_image(self) -> dict[str, tuple[float, float]]:
        """The mean seconds of each method: of the attribution, and of the metrics."""
        sums = dict.fromkeys(self.methods, (0, 0.0, 0.0))
        for result in self._results():
            method = self._task(result).method
            images, attribution_s, metrics_s = sums[method]
            sums[method] = (
                images + result.images,
                attribution_s + result.attribution_s,
                metrics_s + result.metrics_s,
            )
        return {name: (a_s / n, m_s / n) for name, (n, a_s, m_s) in sums.items() if n}

    def export(self) -> None:
        """Write `rows.csv` and `timings.csv`.

        The rows are the same byte for byte, however often the run was interrupted and in however
        many processes it ran.
        """
        with (
            csv_writer(self.folder / ROWS) as rows,
            csv_writer(self.folder / TIMINGS) as timings,
        ):
            rows.write(self.columns)
            timings.write(TIMING_COLUMNS)
            for result in self._results():
                for cells in self._cells(result):
                    rows.write(cells)
                seconds = (result.attribution_s, result.metrics_s)
                timings.write((*self._task(result), result.images, *seconds, result.device))

    def _cells(self, result: _Result) -> list[list[str]]:
        """The rows of a task, without the names of their columns.

        Raises:
            ValueError: other rows than this run writes.
        """
        with self._naming(result):
            method = self._task(result).method
            return read_rows(result.rows, self.columns, method, self.settings["examples"])

    @contextmanager
    def _naming(self, result: _Result) -> Iterator[None]:
        """Add the folder and the task to errors about a result whose checksum is right."""
        try:
            yield
        except ValueError as error:
            raise ArgumentError(
                f"`output` {self.folder}: task {bounded_repr(result.number)} has results that no "
                f"run writes ({first_line(error, 500)}). Name another folder."
            ) from error

    def _task(self, result: _Result) -> Task:
        batch, method = divmod(result.number, len(self.settings["methods"]))
        return Task(batch, self.methods[method])

    def _results(self, *, with_damaged: bool = False) -> Iterator[_Result]:
        """The results of all files in the order of their numbers, each number once."""
        damaged = 0
        lines = heapq.merge(*map(_lines, _files(self.folder)), key=lambda line: line[0])
        for _, copies in itertools.groupby(lines, key=lambda line: line[0]):
            results = [
                _Result(*values)
                for *values, checksum in copies
                if with_damaged or checksum == self.checksum(values)
            ]
            for result in results[:1]:
                if not with_damaged:
                    with self._naming(result):
                        check_result(result)
                yield result
            damaged += not results
        if damaged:
            warn(
                f"`output` {self.folder}: {damaged} of its tasks are damaged and count as not "
                f"done. `evaluate` computes them again."
            )

    def checksum(self, values: Sequence[Any]) -> str:
        """The checksum of a line of the table, which covers the run's settings."""
        return digest((self._settings_digest, *values))

    @cached_property
    def _settings_digest(self) -> str:
        return digest(self.settings)


class ResultWriter:
    """The one writer of a results file, from its creation until `close`.

    Args:
        store: of the run.
        rank: of this process, which writes `results.{rank}.sqlite`.

    Raises:
        RuntimeError: another process or thread is writing to this file, or has just begun another
            run in this folder.
        ValueError: the file is damaged.
    """

    def __init__(self, store: ResultStore, rank: int) -> None:
        self.store, self.file = store, store.folder / f"results.{rank}.sqlite"
        check_no_links(store.folder)
        self.lock = _lock(store.folder, rank)
        try:
            if ResultStore.read(store.folder).settings != store.settings:
                message = f"`output`: another run has just begun in {store.folder}."
                raise FolderInUseError(message)
            with _named_errors(self.file):
                self.connection = sqlite3.connect(self.file, timeout=PATIENCE)
                check_schema(self.connection, _TABLE)
                self.connection.execute(_TABLE.replace("TABLE", "TABLE IF NOT EXISTS"))
        except BaseException:
            self.lock.close()
            raise

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(
        self,
        task: Task,
        rows: Sequence[Mapping[str, Any]],
        seconds: tuple[float, float],
        device: Any,
    ) -> None:
        """Store a task, in one transaction.

        Args:
            task: of the rows.
            rows: one for each image of the batch; missing columns are left empty.
            seconds: of the attribution, and of the metrics.
            device: of the attribution.
        """
        columns, methods = self.store.columns, self.store.methods
        cells = [[_one_line(row.get(column, "")) for column in columns] for row in rows]
        attribution_s, metrics_s = seconds
        result = _Result(
            task.batch * len(methods) + methods.index(task.method),
            len(rows),
            sum(1 for row in rows if row["failure"]),
            attribution_s,
            metrics_s,
            str(device),
            json.dumps(cells),
        )
        with _named_errors(self.file), self.connection:
            self.connection.execute(_INSERT, (*result, self.store.checksum(result)))

    def close(self) -> None:
        """Close the file; another writer may open it then."""
        self.connection.close()
        self.lock.close()


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("results.*.sqlite"))


def _lines(file: Path) -> Iterator[tuple[Any, ...]]:
    """The lines of a file's table in the order of their numbers.

    Each line is read by its own query, because a long query would block the writer.
    """
    if not file.stat().st_size:  # its writer has just created it
        return
    number = -1
    # Not read-only: the first reader after a kill rolls the unfinished transaction back.
    uri = f"{file.absolute().as_uri()}?mode=rw"
    with _named_errors(file):
        connection = sqlite3.connect(uri, timeout=PATIENCE, uri=True)
    with closing(connection):
        connection.text_factory = lambda text: text.decode(errors="replace")
        with _named_errors(file):
            check_schema(connection, _TABLE)
        while True:
            with _named_errors(file):
                lines = connection.execute(_NEXT, (number,)).fetchall()
                if lines and lines[0][0] <= number:
                    raise sqlite3.DatabaseError("numbers out of order")
            if not lines:
                return
            number = lines[0][0]
            yield lines[0]


def _lock(folder: Path, rank: int) -> sqlite3.Connection:
    """An exclusive lock on `results.{rank}.lock`, until the connection or the process ends.

    Raises:
        RuntimeError: another process or thread holds it.
    """
    file = folder / f"results.{rank}.lock"
    with _named_errors(file):
        connection = sqlite3.connect(file, timeout=0, isolation_level=None)
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except BaseException:
            connection.close()
            raise
    return connection


# SQLite's codes of errors that do not mean a damaged file.
_ENVIRONMENT = {
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_INTERRUPT),
    *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_READONLY),
}


@contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Turn SQLite's errors into built-in ones that name the file and say what to do.

    Raises:
        RuntimeError: another process or thread is writing to the file.
        OSError: a full disk, missing permissions, a file system without locks.
        ValueError: the file is damaged.
    """
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeError) as error:  # damaged names need not be text
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            message = f"`output`: another process or thread is writing to {file.parent}."
            raise FolderInUseError(message) from None
        if code in _ENVIRONMENT:
            raise OSError(f"{file}: {error}.") from error
        raise ArgumentError(
            f"`output`: {file} is damaged ({error}). Delete this file, and `evaluate` computes its "
            f"results again."
        ) from error


def _one_line(cell: Any) -> str:
    return " ".join(str(cell).splitlines())


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without nesting, so that errors name the single entries that differ."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}: {key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat
