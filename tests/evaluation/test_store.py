"""The store of a run: tasks are stored as a whole, by one writer, and damage is detected."""

import csv
import functools
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing

import pytest
import torch

from captum_ext._errors import ArgumentError, FolderInUseError
from captum_ext.evaluation import evaluate, summary
from captum_ext.evaluation.store import ResultStore, ResultWriter, Task
from tests.evaluation.subjects import Boxes, FixedMap, exported, forget, rows, three_methods
from tests.networks import tiny_net

QUIET = {"show_progress": False, "normalize": None, "batch_size": 3}
CHEAP = ["pointing_game", "energy", "pxap"]
fork = multiprocessing.get_context("fork")
FILE = "results.0.sqlite"


def two_methods(function=torch.neg):
    return {"a": FixedMap(tiny_net()), "b": FixedMap(tiny_net(), function)}


def evaluated(folder, methods=None, n=7, **options):
    methods = two_methods() if methods is None else methods
    return evaluate(methods, Boxes(n), "energy", output=folder, **QUIET | options)


def execute(folder, *statements):
    with closing(sqlite3.connect(folder / FILE)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def ended(process, seconds=60):
    process.join(seconds)
    return process.exitcode


# --- killed and continued ------------------------------------------------------------------------


def killed_at_statement(folder, word, count):
    """Evaluate until SQLite begins the `count`-th statement that starts with a word."""
    connect = sqlite3.connect

    def connect_and_trace(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(kill)
        return connection

    def kill(statement):
        kill.count -= statement.startswith(word)
        if kill.count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    kill.count = count
    sqlite3.connect = connect_and_trace
    torch.set_num_threads(1)
    evaluated(folder)


def test_a_run_killed_around_any_transaction_ends_with_the_same_rows(tmp_path):
    evaluated(tmp_path / "whole")
    expected = exported(tmp_path / "whole")
    for word in ("BEGIN EXCLUSIVE", "CREATE", "BEGIN ", "INSERT", "COMMIT"):
        counts = {"BEGIN EXCLUSIVE": [1, 2], "CREATE": [1], "BEGIN ": [3, 5]}
        for count in counts.get(word, range(1, 7)):
            folder = tmp_path / f"{word}{count}"
            process = fork.Process(target=killed_at_statement, args=(folder, word, count))
            process.start()
            assert ended(process) == -signal.SIGKILL
            assert not (folder / "rows.csv").exists()
            n_before = {"BEGIN EXCLUSIVE": count, "BEGIN ": 3}.get(word, 1)
            assert n_finished(folder) == count - n_before
            evaluated(folder)
            assert exported(folder) == expected


def killed_in_transaction(folder):
    """Write pages of an unfinished transaction to the file, beside its journal."""
    writer = ResultWriter(ResultStore.read(folder), 0)
    writer.connection.execute("PRAGMA cache_size = 1")
    writer.connection.execute("UPDATE results SET rows = rows || 'x', images = 0")
    for number in range(100, 200):
        values = (number, 3, 0, 0.0, 0.0, "cpu", "x" * 10_000, "")
        writer.connection.execute("INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("reads_first", [True, False])
def test_pages_of_an_unfinished_transaction_are_rolled_back(reads_first, tmp_path):
    expected = evaluated(tmp_path)
    before, content = exported(tmp_path), (tmp_path / FILE).read_bytes()
    forget(tmp_path, "number = 3")
    process = fork.Process(target=killed_in_transaction, args=(tmp_path,))
    process.start()
    assert ended(process) == -signal.SIGKILL
    assert (tmp_path / f"{FILE}-journal").stat().st_size > 512
    assert (tmp_path / FILE).stat().st_size > 10 * len(content)
    if reads_first:
        assert summary(tmp_path).images == {"a": 7, "b": 4}
        assert not (tmp_path / f"{FILE}-journal").exists()
    assert evaluated(tmp_path).figures == expected.figures
    assert exported(tmp_path) == before


def slow_run(folder, pause, devices=1):
    torch.set_num_threads(1)
    options = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    evaluate(three_methods(), Boxes(90, pause=pause), CHEAP, output=folder, **QUIET, **options)


def n_finished(folder):
    is_there = (folder / "settings.json").exists()
    return len(ResultStore.read(folder).finished_tasks()) if is_there else 0


def test_a_run_killed_at_ten_random_moments_ends_with_the_same_rows(tmp_path):
    slow_run(tmp_path / "whole", 0)
    folder, counts, chance = tmp_path / "killed", [], random.Random(7)
    for _ in range(10):
        process, before = fork.Process(target=slow_run, args=(folder, 0.02)), n_finished(folder)
        process.start()
        while process.is_alive() and n_finished(folder) <= before:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.04))
        assert process.is_alive()
        process.kill()
        process.join()
        counts.append(n_finished(folder))
    assert counts[0] < counts[-1] < 90
    slow_run(folder, 0)
    assert exported(folder) == exported(tmp_path / "whole")


def own_group(*args):
    os.setpgrp()
    slow_run(*args)


def test_two_processes_killed_together_end_with_the_same_rows(tmp_path):
    slow_run(tmp_path / "whole", 0)
    folder = tmp_path / "killed"
    process = multiprocessing.get_context("spawn").Process(target=own_group, args=(folder, 0.02, 2))
    process.start()
    while process.is_alive() and not (
        (folder / "results.1.sqlite").exists() and n_finished(folder) > 9
    ):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert 9 < n_finished(folder) < 90
    slow_run(folder, 0, 2)
    assert exported(folder) == exported(tmp_path / "whole")


def test_a_result_deleted_from_the_store_is_the_only_one_computed_again(tmp_path):
    calls = []

    def counted(x):
        calls.append(len(x))
        return -x

    methods = two_methods(counted)
    evaluated(tmp_path, methods, 9)
    expected = exported(tmp_path)
    for lost, n_calls in (("number = 3", 1), ("number IN (1, 5)", 2), ("number = 2", 0), ("0", 0)):
        forget(tmp_path, lost)
        calls.clear()
        assert evaluated(tmp_path, methods, 9).images == {"a": 9, "b": 9}
        assert len(calls) == n_calls
        assert exported(tmp_path) == expected


def test_failed_tasks_can_be_deleted_to_be_computed_again(tmp_path):
    data = [Boxes()[i] for i in range(7)]
    data[4].target = None
    with pytest.warns(UserWarning, match="Some rows failed"):
        evaluate(two_methods(), data, "energy", output=tmp_path, **QUIET)
    assert forget(tmp_path, "failures > 0") == 2


# --- two writers ---------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    options = {"output": tmp_path, **QUIET, "batch_size": 1}
    other = fork.Process(
        target=evaluate,
        args=({"a": FixedMap(tiny_net())}, Boxes(200, pause=0.05), "energy"),
        kwargs=options,
    )
    other.start()
    try:
        while not list(tmp_path.glob("results.0.sqlite")):
            time.sleep(0.05)
        with pytest.raises(FolderInUseError, match="`output`: another process or") as caught:
            evaluate({"a": FixedMap(tiny_net())}, Boxes(200), "energy", **options)
    finally:
        other.kill()
        other.join()
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.argument == "output"
    result = evaluate({"a": FixedMap(tiny_net())}, Boxes(200), "energy", **options)
    assert result.images == {"a": 200}


def can_lock(folder):
    """Try to take the writer's lock in a process that shares nothing with this one."""
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN EXCLUSIVE')"
    command = [sys.executable, "-c", code, str(folder / "results.0.lock")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0 or "database is locked" in process.stderr
    return process.returncode == 0


def test_reading_what_one_writes_does_not_open_the_lock(tmp_path):
    """POSIX locks end when their process closes the file through any descriptor."""
    evaluated(tmp_path)
    writer = ResultWriter(ResultStore.read(tmp_path), 0)
    summary(tmp_path)
    ResultStore.read(tmp_path).export()
    with pytest.raises(RuntimeError, match="another process or thread"):
        ResultWriter(ResultStore.read(tmp_path), 0)
    assert not can_lock(tmp_path)
    writer.close()
    assert can_lock(tmp_path)


def in_threads(folder, seeds):
    """The images of each summary, or the error, of runs that begin together, one for each seed.

    The run that computes maps goes on when the others have ended.
    """
    barrier, results = threading.Barrier(len(seeds)), []

    def waiting(x):
        deadline = time.monotonic() + 60
        while len(results) < len(seeds) - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        return -x

    def work(methods, seed):
        barrier.wait()
        try:
            results.append(evaluated(folder, methods, 27, seed=seed).images)
        except Exception as error:
            results.append(error)

    arguments = [(two_methods(waiting), seed) for seed in seeds]
    threads = [threading.Thread(target=work, args=pair) for pair in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_of_four_threads_one_writes_and_three_are_refused(tmp_path):
    evaluated(tmp_path / "alone", n=27)
    *refused, written = in_threads(tmp_path / "run", [0, 0, 0, 0])
    assert written == {"a": 27, "b": 27}
    for error in refused:
        assert isinstance(error, RuntimeError)
        assert str(error).startswith("`output`: another process or thread is writing to ")
    assert exported(tmp_path / "run") == exported(tmp_path / "alone")


@pytest.mark.parametrize("repeat", range(5))
def test_of_two_runs_that_begin_together_one_is_refused(repeat, tmp_path):
    """Whichever writes its settings last must not own the results of the other."""
    refused, written = in_threads(tmp_path, [0, 1])
    assert written == {"a": 27, "b": 27}
    assert isinstance(refused, RuntimeError | ValueError)
    assert str(refused).startswith("`output`")
    assert "\n" not in str(refused)
    assert summary(tmp_path).images == written


def test_a_run_whose_settings_another_one_replaced_is_refused(tmp_path):
    names = {"methods": {"a": "A"}, "metrics": {}, "columns": {}}
    store = ResultStore.create(tmp_path, {"format": 3, "examples": 1, **names})
    ResultStore.create(tmp_path, store.settings | {"seed": 1})
    with pytest.raises(RuntimeError, match="another run has just begun in"):
        ResultWriter(store, 0)
    ResultWriter(ResultStore.read(tmp_path), 0).close()  # the lock is free again


def test_a_summary_of_a_run_that_is_being_written(tmp_path):
    """Readers see whole tasks and do not make the writer fail."""
    process = fork.Process(target=slow_run, args=(tmp_path, 0.005))
    process.start()
    counts = []
    while process.is_alive():
        if (tmp_path / "settings.json").exists():
            result = summary(tmp_path, resamples=2)
            counts.append(sum(result.images.values()))
            assert result.failures == {"Grad-CAM": 0, "IG": 0, "noisy": 0}
    assert process.exitcode == 0
    assert counts == sorted(counts)
    assert all(count % 3 == 0 for count in counts)
    assert len({count for count in counts if 0 < count < 270}) > 2
    slow_run(tmp_path / "alone", 0)
    assert exported(tmp_path) == exported(tmp_path / "alone")


def test_a_reader_that_stops_between_rows_does_not_hold_up_the_writer(tmp_path, monkeypatch):
    evaluated(tmp_path)
    monkeypatch.setattr("captum_ext.evaluation.store.PATIENCE", 0)
    store = ResultStore.read(tmp_path)
    reader = store.rows()
    next(reader)
    with ResultWriter(store, 0) as writer:
        writer.write(Task(9, "a"), list(store.rows())[:3], (0.0, 0.0), "cpu")
        assert next(reader)["index"] == "1"


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """A finished run, whose results file a function replaces by bytes; then what can be read."""
    evaluated(tmp_path, n=4)
    content = (tmp_path / FILE).read_bytes()
    expected = list(ResultStore.read(tmp_path).rows())

    def read(content):
        (tmp_path / FILE).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(ResultStore.read(tmp_path).rows())

    return content, expected, read


def are_whole_tasks(rows, expected):
    """Check that rows are those of some expected tasks, of 3 and of 1 images by two methods."""
    tasks = [expected[:3], expected[3:6], expected[6:7], expected[7:]]
    return rows == [row for task in tasks if task[0] in rows for row in task]


def test_a_flipped_bit_anywhere_never_changes_a_row(damaged, tmp_path):
    content, expected, read = damaged
    chance, outcomes = random.Random(0), []
    used = [i for i, byte in enumerate(content) if byte]
    for position in chance.sample(used, 600):
        flipped = bytearray(content)
        flipped[position] ^= 1 << chance.randrange(8)
        try:
            read_rows = read(flipped)
        except ValueError as error:
            outcomes.append(str(error))
        else:
            assert are_whole_tasks(read_rows, expected), position
            outcomes.append(len(read_rows))
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert all(e.startswith(f"`output`: {tmp_path / FILE} is damaged (") for e in errors)
    assert {8, 7, 5} <= set(outcomes)
    assert errors


def test_a_task_that_is_damaged_counts_as_not_done(tmp_path):
    calls = []
    methods = {"a": FixedMap(tiny_net(), lambda x: calls.append(0) or x)}
    before = evaluated(tmp_path, methods)
    expected = exported(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    energy = rows(tmp_path)[-1]["energy"].encode()
    assert content.count(energy) == 1
    (tmp_path / FILE).write_bytes(content.replace(energy, energy[:-1] + b"x"))
    calls.clear()
    with pytest.warns(UserWarning, match=r"`output` .*: 1 of its tasks are damaged .* not done"):
        assert summary(tmp_path).images == {"a": 6}
    with pytest.warns(UserWarning, match="1 of its tasks are damaged"):
        assert evaluated(tmp_path, methods).figures == before.figures
    assert len(calls) == 1
    assert exported(tmp_path) == expected
    assert summary(tmp_path).figures == before.figures


def test_a_damaged_task_in_the_file_of_another_process_is_replaced(tmp_path):
    before = evaluated(tmp_path)
    expected = exported(tmp_path)
    (tmp_path / FILE).rename(tmp_path / "results.1.sqlite")
    content = (tmp_path / "results.1.sqlite").read_bytes()
    (tmp_path / "results.1.sqlite").write_bytes(content.replace(b"picture, 3", b"picture, 4"))
    with pytest.warns(UserWarning, match="2 of its tasks are damaged"):
        assert evaluated(tmp_path).figures == before.figures
    assert exported(tmp_path) == expected
    assert n_finished(tmp_path) == 6


@pytest.mark.parametrize(
    "column", ["rows = '[]'", "metrics_s = 0", "device = 'cuda'", "number = 9"]
)
def test_the_checksum_covers_every_column(column, tmp_path):
    evaluated(tmp_path)
    expected = exported(tmp_path)
    execute(tmp_path, f"UPDATE results SET {column} WHERE number = 5")
    with pytest.warns(UserWarning, match="1 of its tasks are damaged"):
        assert n_finished(tmp_path) == 5
    with pytest.warns(UserWarning, match="1 of its tasks are damaged"):
        evaluated(tmp_path)
    assert exported(tmp_path) == expected


def test_results_of_another_run_copied_into_the_folder_count_as_damaged(tmp_path):
    evaluated(tmp_path / "one")
    evaluated(tmp_path / "two", seed=1)
    (tmp_path / "two" / FILE).replace(tmp_path / "one" / "results.1.sqlite")
    (tmp_path / "one" / FILE).unlink()
    with pytest.warns(UserWarning, match="6 of its tasks are damaged"):
        assert summary(tmp_path / "one").images == {"a": 0, "b": 0}


def test_a_truncated_file_is_an_error_or_loses_whole_tasks(damaged, tmp_path):
    content, expected, read = damaged
    assert read(b"") == []
    errors = 0
    for length in range(101, len(content), 101):
        try:
            read_rows = read(content[:length])
        except ValueError as error:
            errors += "is damaged (" in str(error)
        else:  # SQLite adds zeros to the last page
            assert length > 4096
            assert len(read_rows) < 8
            assert are_whole_tasks(read_rows, expected), length
    assert errors >= 4096 // 101


@pytest.mark.parametrize("content", [b"index,name\n" * 200, b"\0" * 4096])
def test_a_file_that_is_no_database_is_an_error_for_reader_and_writer(content, tmp_path):
    evaluated(tmp_path)
    expected = exported(tmp_path)
    (tmp_path / FILE).write_bytes(content)
    message = rf"`output`: .*{FILE} is damaged \(.*Delete this file"
    for call in (summary, evaluated):
        with pytest.raises(ArgumentError, match=message) as caught:
            call(tmp_path)
        assert caught.value.argument == "output"
    (tmp_path / FILE).unlink()
    evaluated(tmp_path)
    assert exported(tmp_path) == expected


def test_the_writer_refuses_a_damaged_file_and_frees_its_lock(tmp_path):
    evaluated(tmp_path)
    (tmp_path / FILE).write_bytes(b"index,name\n" * 200)
    store = ResultStore.read(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="is damaged"):
            ResultWriter(store, 0)


def test_a_full_disk_is_an_os_error_and_keeps_what_was_stored(tmp_path):
    evaluated(tmp_path)
    store = ResultStore.read(tmp_path)
    row = {"failure": "", "name": "n" * 100_000}
    with ResultWriter(store, 0) as writer:
        (pages,) = writer.connection.execute("PRAGMA page_count").fetchone()
        writer.connection.execute(f"PRAGMA max_page_count = {pages + 1}")
        with pytest.raises(OSError, match=f"{FILE}: database or disk is full"):
            writer.write(Task(9, "a"), [row], (0.0, 0.0), "cpu")
    assert n_finished(tmp_path) == 6


# --- settings, exports and old folders -----------------------------------------------------------


@pytest.mark.parametrize("rows_file", ["rows.csv", "rows.1.csv", FILE])
def test_rows_without_settings_are_refused(rows_file, tmp_path):
    (tmp_path / rows_file).write_text("index,name,method\n")
    with pytest.raises(ValueError, match=r"`output` .* has rows, but no settings\.json"):
        evaluated(tmp_path)


def test_the_folder_of_an_older_version_is_refused(tmp_path):
    evaluated(tmp_path)
    (tmp_path / FILE).unlink()
    file = tmp_path / "settings.json"
    file.write_text(file.read_text().replace('"format": 3', '"format": 2'))
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    message = r"`output` .* has a run of format 2, written by another version; .* format 3\. Name"
    for call in (summary, evaluated, functools.partial(evaluated, seed=2)):
        with pytest.raises(ValueError, match=message):
            call(tmp_path)
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 3'])
def test_damaged_settings_are_an_error(text, tmp_path):
    evaluated(tmp_path)
    (tmp_path / "settings.json").write_text(text)
    for call in (summary, evaluated):
        with pytest.raises(ValueError, match=r"`output`: .*settings\.json is damaged"):
            call(tmp_path)


def test_exports_have_the_columns_of_the_metrics_and_of_timings(tmp_path):
    result = evaluated(tmp_path)
    lines = exported(tmp_path).splitlines()
    assert lines[0] == b"index,name,method,label,target,failure,energy"
    assert lines[1].startswith(b'0,"picture, 0",a,0,0,,0.')
    indices = [
        row["index"] + row["method"] for row in csv.DictReader((tmp_path / "rows.csv").open())
    ]
    assert indices == [
        f"{i}{method}" for batch in ("012", "345", "6") for method in "ab" for i in batch
    ]
    with (tmp_path / "timings.csv").open(newline="") as file:
        timings = list(csv.DictReader(file))
    assert list(timings[0]) == ["batch", "method", "images", "attribution_s", "metrics_s", "device"]
    assert [(t["batch"], t["method"], t["images"]) for t in timings] == [
        (batch, method, "1" if batch == "2" else "3") for batch in "012" for method in "ab"
    ]
    assert {timing["device"] for timing in timings} == {"cpu"}
    mean = sum(float(t["attribution_s"]) for t in timings if t["method"] == "b") / 7
    assert result.seconds["b"][0] == pytest.approx(mean)


def test_cells_may_be_longer_than_the_csv_module_takes_by_itself(tmp_path):
    """A curve of each pixel is, in pictures of 224 x 224."""
    before = csv.field_size_limit(64)
    try:
        metrics = {"deletion": {"step": 1}}
        result = evaluate({"a": FixedMap(tiny_net())}, Boxes(), metrics, output=tmp_path, **QUIET)
        assert csv.field_size_limit() == 64
    finally:
        csv.field_size_limit(before)
    assert all(len(row["deletion_curve"]) > 64 for row in rows(tmp_path))
    assert result.images == {"a": 7}
