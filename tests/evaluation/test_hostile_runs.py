"""Folders of strangers: settings, rows and packed cells of wrong types and sizes."""

import base64
import json
import sqlite3
import tracemalloc
import zlib
from contextlib import closing, contextmanager

import numpy as np
import pytest

from captum_ext._errors import ArgumentError
from captum_ext.evaluation import summary
from captum_ext.evaluation.columns import pack, unpack
from captum_ext.evaluation.store import ResultStore, ResultWriter

FILE = "results.0.sqlite"


def message_of(call, *args):
    """The text of a ValueError about `output`, which must be short."""
    with pytest.raises(ArgumentError) as caught:
        call(*args)
    assert caught.value.argument == "output"
    assert len(str(caught.value)) < 1500
    return str(caught.value)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("examples", 10**9),
        ("examples", 0),
        ("examples", True),
        ("examples", 4.0),
        ("examples", "4"),
        ("examples", None),
        ("methods", {}),
        ("methods", ["a"]),
        ("methods", None),
        ("metrics", []),
        ("metrics", {"energy": 3}),
        ("columns", {"energy": "energy"}),
        ("columns", {"energy": [3]}),
        ("columns", {}),
        ("columns", {"energy": ["other"]}),
        ("metrics", {"other": {}}),
        ("metrics", {"max_box_acc": {}}),
        ("metrics", {"max_box_acc": {"iou_thresholds": [0.5] * 10**6, "convention": "components"}}),
        ("metrics", {"max_box_acc": {"iou_thresholds": ["x"], "convention": "components"}}),
        ("metrics", {"max_box_acc": {"iou_thresholds": [0.5], "convention": "x" * 10**6}}),
    ],
)
def test_settings_of_wrong_types_and_sizes_are_refused(entry, value, run):
    file = run / "settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {entry: value}))
    assert f"{file} is damaged (" in message_of(summary, run)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"format": ' + "9" * 100_000 + "}", "{}" + " " * 2**24, '"' + "x" * 999],
)
def test_settings_of_any_depth_and_length_are_refused_in_few_words(text, run):
    (run / "settings.json").write_text(text)
    assert "settings.json is damaged (" in message_of(summary, run)


def test_settings_of_a_long_format_are_refused_in_few_words(run):
    (run / "settings.json").write_text(json.dumps({"format": "x" * 10**6}))
    assert "has a run of format 'xxx" in message_of(summary, run)


def test_resamples_beyond_any_memory_are_refused_before_they_are_drawn(run):
    with pytest.raises(ArgumentError, match=r"`resamples` .* of 4 images .* 64 GB of memory"):
        summary(run, resamples=10**11)


# --- rows ----------------------------------------------------------------------------------------


def with_row(folder, **columns):
    """Change values of the first task, and give it the checksum that fits."""
    store = ResultStore.read(folder)
    with closing(sqlite3.connect(folder / FILE)) as connection, connection:
        line = connection.execute("SELECT * FROM results WHERE number = 0").fetchone()
        names = [d[0] for d in connection.execute("SELECT * FROM results").description]
        values = list({**dict(zip(names, line, strict=True)), **columns}.values())[:-1]
        values.append(store.checksum(values))
        marks = ", ".join("?" * len(values))
        connection.execute(f"INSERT OR REPLACE INTO results VALUES ({marks})", values)


def cells_of(folder, **changes):
    """The first task's rows with other cells, as JSON."""
    store = ResultStore.read(folder)
    rows = [dict(row) for row in list(store.rows())[:3]]
    rows[0] |= changes
    return json.dumps([[row[column] for column in store.columns] for row in rows])


@pytest.mark.parametrize(
    "columns",
    [
        {"rows": "[" * 100_000},
        {"rows": "{}"},
        {"rows": "3"},
        {"rows": '[["0"]]'},
        {"rows": "[[0, 1, 2, 3, 4, 5, 6]]"},
        {"rows": '["' + "x" * 10**6 + '"]'},
        {"rows": b"[]"},
        {"images": "many"},
        {"images": -1},
        {"failures": 0.5},
        {"attribution_s": "x" * 10**6},
        {"attribution_s": float("inf")},
        {"device": b"cpu"},
    ],
)
def test_rows_of_wrong_types_are_refused_although_their_checksum_fits(columns, run):
    with_row(run, **columns)
    assert str(run) in message_of(summary, run)


@pytest.mark.parametrize(
    "cells",
    [
        {"index": "4"},
        {"index": "-1"},
        {"index": "9" * 5000},
        {"index": "x"},
        {"method": "b" * 10**6},
        {"energy": "x" * 10**6},
        {"pixel_counts": "no base64"},
        {"pixel_counts": base64.b64encode(b"no zlib").decode()},
        {"pixel_counts": pack(np.zeros(2001, "<i4"))},
        {"pixel_counts": pack(np.zeros(10**7, "<i4"))},
        {"ious_largest_components": pack(np.zeros(999, "<f4"))},
        {"deletion_curve": pack(np.zeros(3, "<f4"))},
        {"deletion_curve": pack(np.zeros(10**7, "<f4"))},
        {"deletion_curve": pack(np.zeros(0, "<f4"))},
    ],
)
def test_cells_of_wrong_sizes_are_refused_although_their_checksum_fits(cells, run_of_all):
    with_row(run_of_all, rows=cells_of(run_of_all, **cells))
    assert str(run_of_all) in message_of(summary, run_of_all)


def test_a_cell_unpacks_only_to_its_size():
    """Half a megabyte of text may unpack to 400 MB."""
    text = base64.b64encode(zlib.compress(b"\0" * 400_000_000, 9)).decode()
    assert len(text) > 500_000
    for count in (None, 1000):
        with peak_below(32 * 2**20), pytest.raises(ValueError, match="has more than"):
            unpack(text, "<f4", count)
    with pytest.raises(ValueError, match="cut off"):
        unpack(base64.b64encode(zlib.compress(b"\0" * 999)[:-8]).decode(), "<f4")


@contextmanager
def peak_below(size):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("n", [2, 101, 50_177, 10**6])
@pytest.mark.parametrize("flat", [True, False])
def test_curves_of_every_length_unpack(n, flat):
    """Their x values differ, so that no text is as short as a sixteenth of the curve."""
    y = np.zeros(n) if flat else np.random.default_rng(0).random(n)
    curve = np.stack((np.linspace(0, 1, n), y)).astype("<f4")
    assert (unpack(pack(curve), "<f4").reshape(2, -1) == curve).all()


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE VIEW v AS SELECT 1"],
        ["ALTER TABLE results RENAME TO r", "CREATE VIEW results AS SELECT * FROM r"],
        ["CREATE TRIGGER t AFTER INSERT ON results BEGIN DELETE FROM results; END"],
        ["ALTER TABLE results RENAME COLUMN device TO d"],
        ["CREATE INDEX i ON results (device)"],
    ],
)
def test_a_file_with_more_than_its_table_is_refused(statements, run):
    with closing(sqlite3.connect(run / FILE)) as connection, connection:
        for statement in statements:
            connection.execute(statement)
    assert f"{FILE} is damaged (" in message_of(summary, run)


def test_the_writer_starts_no_trigger(run):
    with closing(sqlite3.connect(run / FILE)) as connection, connection:
        connection.execute("CREATE TRIGGER t AFTER INSERT ON results BEGIN SELECT 1; END")
    store = ResultStore.read(run)
    assert f"{FILE} is damaged (" in message_of(ResultWriter, store, 0)


def test_a_computed_cell_of_a_gigabyte_is_refused(run):
    (run / FILE).unlink()
    names = "images, failures, attribution_s, metrics_s, device, checksum"
    rows = "rows TEXT GENERATED ALWAYS AS (printf('%.*c', 9000000, 'x'))"
    with closing(sqlite3.connect(run / FILE)) as connection, connection:
        connection.execute(f"CREATE TABLE results (number INTEGER PRIMARY KEY, {names}, {rows})")
        connection.execute("INSERT INTO results (number) VALUES (0)")
    assert f"{FILE} is damaged (expected our table, got" in message_of(summary, run)
