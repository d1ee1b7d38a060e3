"""A run writes through no link, and a full disk leaves no part of a file."""

import errno
import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch

from captum_ext._errors import ArgumentError, InputError
from captum_ext._identity import atomic_write
from captum_ext._tensor_files import write_tensors
from captum_ext.evaluation.store import ResultStore
from tests.evaluation.subjects import METRICS, evaluate_boxes, exported

FILE = "results.0.sqlite"


@pytest.mark.parametrize(
    "name",
    [
        *("settings.json", "rows.csv", "timings.csv", "summary.md", "figure.png", "curves.png"),
        *(FILE, "results.0.lock", f"{FILE}-journal", "results.1.sqlite"),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_nothing_is_written_through_links(name, exists, tmp_path):
    victim, run = tmp_path / "victim", tmp_path / "run"
    run.mkdir()
    if exists:
        victim.write_bytes(b"precious")
    (run / name).symlink_to(victim)
    with pytest.raises(ArgumentError, match=f"^`output`.*{name}' is a symbolic link"):
        evaluate_boxes(run)
    assert [file.name for file in run.iterdir()] == [name]
    assert victim.exists() == exists
    assert not exists or victim.read_bytes() == b"precious"


def test_a_link_made_during_the_run_is_not_followed(tmp_path):
    victim, run = tmp_path / "victim", tmp_path / "run"
    evaluate_boxes(run)
    victim.write_bytes(b"precious")
    store = ResultStore.read(run)
    (run / "rows.csv").unlink()
    (run / "rows.csv").symlink_to(victim)
    with pytest.raises(InputError, match=r"rows\.csv' is a symbolic link"):
        store.export()
    assert victim.read_bytes() == b"precious"
    assert not list(run.glob(".*"))


def test_the_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    assert evaluate_boxes(tmp_path / "run").images == {"a": 4}
    assert (tmp_path / "disk" / "rows.csv").is_file()


def test_names_of_unfinished_files_cannot_be_guessed(tmp_path):
    names = set()
    for _ in range(2):
        with atomic_write(tmp_path / "a") as unfinished:
            names.add(unfinished.name)
            unfinished.write_text("")
    assert len(names) == 2


@contextmanager
def files_of_at_most(size):
    """A disk that is full: no file may grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_no_file_takes_the_name_of_a_pipe_or_a_folder(tmp_path):
    """A renamed file would replace a pipe or, for the superuser, a device such as /dev/null."""
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    for file in ("pipe.pt", "folder.pt"):
        with pytest.raises(InputError, match=f"{file}' is a .*: give the name of a file$"):
            write_tensors(tmp_path / file, {})
    assert (tmp_path / "pipe.pt").is_fifo()
    with pytest.raises(InputError, match=r"^'\.' is a folder"):
        write_tensors("", {})


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_full_disk_is_an_error_with_the_name_of_the_file(size, tmp_path):
    """The RuntimeError of `torch.save` names neither the file nor the reason."""
    file = tmp_path / "a.pt"
    with files_of_at_most(size), pytest.raises(OSError, match="too large") as caught:
        write_tensors(file, {"a": torch.zeros(10_000)})
    assert caught.value.filename == str(file)
    assert not list(tmp_path.iterdir())

    def write_bytes():
        with atomic_write(file) as unfinished:
            unfinished.write_bytes(bytes(10_000))

    with files_of_at_most(size), pytest.raises(OSError, match="too large") as caught:
        write_bytes()
    assert caught.value.filename == str(file)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 10, 100])
def test_a_full_disk_leaves_the_old_export_and_no_partial_file(size, run):
    before = sorted((file.name, file.read_bytes()) for file in run.iterdir())
    store = ResultStore.read(run)
    with files_of_at_most(size), pytest.raises(OSError, match="too large"):
        store.export()
    assert sorted((file.name, file.read_bytes()) for file in run.iterdir()) == before


@pytest.mark.parametrize("size", [0, 10, 512, 5000])
def test_a_run_on_a_full_disk_can_go_on_later(size, run_of_all, tmp_path):
    with files_of_at_most(size), pytest.raises(OSError, match=r"too large|disk|I/O"):
        evaluate_boxes(tmp_path / "full", metrics=METRICS)
    assert not list((tmp_path / "full").glob(".*"))
    evaluate_boxes(tmp_path / "full", metrics=METRICS)
    assert exported(tmp_path / "full") == exported(run_of_all)


def test_a_write_that_fails_leaves_no_partial_file(run, monkeypatch):
    before = exported(run)

    class Full:
        def writerow(self, row):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("csv.writer", lambda *args, **kwargs: Full())
    with pytest.raises(OSError, match="No space left"):
        ResultStore.read(run).export()
    assert exported(run) == before
