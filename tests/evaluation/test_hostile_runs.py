"""Folders of strangers: wrong settings and rows, packed cells, links, names and full disks."""

import base64
import csv
import errno
import json
import os
import resource
import signal
import sqlite3
import zlib
from contextlib import closing, contextmanager

import numpy as np
import pytest

from captum_ext._errors import ArgumentError, InputError
from captum_ext._identity import atomic_write
from captum_ext.evaluation import evaluate, summary
from captum_ext.evaluation.columns import pack, unpack
from captum_ext.evaluation.export import escape_cell, unescape_cell
from captum_ext.evaluation.results import Estimate, Summary
from captum_ext.evaluation.store import ResultStore, ResultWriter
from tests.evaluation.subjects import Boxes, FixedMap, exported
from tests.networks import tiny_net

QUIET = {"show_progress": False, "normalize": None, "batch_size": 3}
METRICS = {"energy": {}, "pxap": {}, "max_box_acc": {}, "deletion": {"step": 0.25}}
FILE = "results.0.sqlite"


def evaluated(folder, name="a", metrics="energy", **options):
    return evaluate({name: FixedMap(tiny_net())}, Boxes(4), metrics, output=folder, **QUIET)


def message_of(call, *args):
    """The text of a ValueError, which must be short."""
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
def test_settings_of_wrong_types_and_sizes_are_refused(entry, value, tmp_path):
    evaluated(tmp_path)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {entry: value}))
    assert f"{file} is damaged (" in message_of(summary, tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"format": ' + "9" * 100_000 + "}", "{}" + " " * 2**24, '"' + "x" * 999],
)
def test_settings_of_any_depth_and_length_are_refused_in_few_words(text, tmp_path):
    evaluated(tmp_path)
    (tmp_path / "settings.json").write_text(text)
    assert "settings.json is damaged (" in message_of(summary, tmp_path)


def test_settings_of_a_long_format_are_refused_in_few_words(tmp_path):
    evaluated(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"format": "x" * 10**6}))
    assert "has a run of format 'xxx" in message_of(summary, tmp_path)


def test_resamples_beyond_any_memory_are_refused_before_they_are_drawn(tmp_path):
    evaluated(tmp_path)
    with pytest.raises(ArgumentError, match=r"`resamples` .* of 4 images .* 64 GB of memory"):
        summary(tmp_path, resamples=10**11)


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
        {"rows": 3},
        {"images": "many"},
        {"images": -1},
        {"failures": 0.5},
        {"attribution_s": "x" * 10**6},
        {"attribution_s": float("inf")},
        {"device": 3},
    ],
)
def test_rows_of_wrong_types_are_refused_although_their_checksum_fits(columns, tmp_path):
    evaluated(tmp_path)
    with_row(tmp_path, **columns)
    assert str(tmp_path) in message_of(summary, tmp_path)


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
def test_cells_of_wrong_sizes_are_refused_although_their_checksum_fits(cells, tmp_path):
    evaluated(tmp_path, metrics=METRICS)
    with_row(tmp_path, rows=cells_of(tmp_path, **cells))
    assert str(tmp_path) in message_of(summary, tmp_path)


def test_a_cell_unpacks_only_to_its_size():
    """Half a megabyte of text may unpack to 400 MB."""
    text = base64.b64encode(zlib.compress(b"\0" * 400_000_000, 1)).decode()
    assert len(text) > 500_000
    for count in (None, 1000):
        with peak_below(64 * 2**20), pytest.raises(ValueError, match="has more than"):
            unpack(text, "<f4", count)
    with pytest.raises(ValueError, match="cut off"):
        unpack(base64.b64encode(zlib.compress(b"\0" * 999)[:-8]).decode(), "<f4")


@contextmanager
def peak_below(size):
    import tracemalloc

    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("n", [2, 101, 50_177, 10**6])
@pytest.mark.parametrize("flat", [True, False])
def test_curves_of_every_length_unpack(n, flat):
    """Their x values differ, so that they are never packed to a 64th, even where y is constant."""
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
def test_a_file_with_more_than_its_table_is_refused(statements, tmp_path):
    evaluated(tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE)) as connection, connection:
        for statement in statements:
            connection.execute(statement)
    assert f"{FILE} is damaged (" in message_of(summary, tmp_path)


def test_the_writer_starts_no_trigger(tmp_path):
    evaluated(tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE)) as connection, connection:
        connection.execute("CREATE TRIGGER t AFTER INSERT ON results BEGIN SELECT 1; END")
    store = ResultStore.read(tmp_path)
    assert f"{FILE} is damaged (" in message_of(ResultWriter, store, 0)


def test_a_computed_cell_of_a_gigabyte_is_refused(tmp_path):
    evaluated(tmp_path)
    (tmp_path / FILE).unlink()
    names = "images, failures, attribution_s, metrics_s, device, checksum"
    rows = "rows TEXT GENERATED ALWAYS AS (printf('%.*c', 900000000, 'x'))"
    with closing(sqlite3.connect(tmp_path / FILE)) as connection, connection:
        connection.execute(f"CREATE TABLE results (number INTEGER PRIMARY KEY, {names}, {rows})")
        connection.execute("INSERT INTO results (number) VALUES (0)")
    assert f"{FILE} is damaged (string or blob too big)" in message_of(summary, tmp_path)


# --- links and full disks ------------------------------------------------------------------------


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
    assert f"{name}' is a symbolic link" in message_of(evaluated, run)
    assert os.listdir(run) == [name]
    assert victim.exists() == exists
    assert not exists or victim.read_bytes() == b"precious"


def test_a_link_made_during_the_run_is_not_followed(tmp_path):
    victim, run = tmp_path / "victim", tmp_path / "run"
    evaluated(run)
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
    assert evaluated(tmp_path / "run").images == {"a": 4}
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


@pytest.mark.parametrize("size", [0, 10, 200])
def test_a_full_disk_leaves_the_old_export_and_no_partial_file(size, tmp_path):
    evaluated(tmp_path)
    before = sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir())
    store = ResultStore.read(tmp_path)
    with files_of_at_most(size), pytest.raises(OSError, match="too large"):
        store.export()
    assert sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir()) == before


@pytest.mark.parametrize("size", [0, 10, 512, 5000, 13_000])
def test_a_run_on_a_full_disk_can_go_on_later(size, tmp_path):
    evaluated(tmp_path / "whole")
    with files_of_at_most(size), pytest.raises(OSError, match=r"too large|disk|I/O"):
        evaluated(tmp_path / "run", metrics=METRICS)
    assert not list((tmp_path / "run").glob(".*"))
    (tmp_path / "other").mkdir()
    evaluated(tmp_path / "other", metrics=METRICS)
    evaluated(tmp_path / "run", metrics=METRICS)
    assert exported(tmp_path / "run") == exported(tmp_path / "other")


def test_a_write_that_fails_leaves_no_partial_file(tmp_path, monkeypatch):
    evaluated(tmp_path)
    before = exported(tmp_path)

    class Full:
        def writerow(self, row):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("csv.writer", lambda *args, **kwargs: Full())
    with pytest.raises(OSError, match="No space left"):
        ResultStore.read(tmp_path).export()
    assert exported(tmp_path) == before


# --- names in exports ----------------------------------------------------------------------------

FORMULAS = ["=1+1", "+cmd", "-cmd|' /C calc'!A0", "@SUM(1)", "\tx", "\rx", "'=1", "''-x", "=1\n+2"]


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_escaped_and_read_back(text):
    assert escape_cell(text) == f"'{text}"
    assert unescape_cell(escape_cell(text)) == text


@pytest.mark.parametrize(
    "text", ["", "-1.5", "+3", "-1e-05", "-inf", "nan", "a", "'a'", "'", 1, -1.5]
)
def test_numbers_and_other_texts_stay_as_they_are(text):
    assert escape_cell(text) == text
    assert unescape_cell(str(text)) == str(text)


class Named(Boxes):
    def __getitem__(self, index):
        entry = super().__getitem__(index)
        entry.name = f"=HYPERLINK({index})"
        return entry


def test_the_export_of_a_run_has_no_formula(tmp_path):
    methods = {"@method": FixedMap(tiny_net()), "-1": FixedMap(tiny_net())}

    def fail(batch):
        raise ValueError("=cmd")

    fail.version = "1"
    metrics = {"+metric": Negative(), "energy": {}}
    result = evaluate(methods, Named(4), metrics, output=tmp_path, **QUIET)
    assert result.figures["@method"]["+metric"].value == -1.5  # summaries read the store
    for name in ("rows.csv", "timings.csv"):
        with (tmp_path / name).open(newline="") as file:
            lines = list(csv.reader(file))
        assert not [cell for line in lines for cell in line if cell[:1] in ("=", "+", "@")]
    with (tmp_path / "rows.csv").open(newline="") as file:
        first, *_ = csv.DictReader(file)
    assert first["name"] == "'=HYPERLINK(0)"
    assert first["'+metric"] == "-1.5"
    assert unescape_cell(first["method"]) == "@method"


class Negative:
    version = "1"

    def __call__(self, batch):
        return [-1.5] * len(batch.examples)

    __qualname__ = "Negative"


HOSTILE = "<script>x</script>|[a](b)*`_\n# $x^{$"


def test_names_are_plain_text_in_markdown_and_figures(tmp_path):
    estimate = Estimate(0.5, 0.25, 0.75, 4)
    figures = {HOSTILE: {HOSTILE: estimate}, "other": {HOSTILE: estimate}}
    band = (np.arange(2.0),) * 4
    from captum_ext.evaluation.results import Band

    curves = {name: {HOSTILE: Band(*band, "x")} for name in figures}
    counts = dict.fromkeys(figures, 4)
    result = Summary(
        figures,
        {"other": {HOSTILE: estimate}},
        HOSTILE,
        counts,
        counts,
        dict.fromkeys(figures, "<img onerror=x>\n\n<b>"),
        {},
        {HOSTILE: True},
        curves,
    )
    text = result.markdown()
    assert "<" not in text
    assert r"&lt;script&gt;x&lt;/script&gt;\|\[a\](b)\*\`\_ # $x^{$" in text
    lines = text.splitlines()
    assert len({line.replace(r"\|", "").count("|") for line in lines if line.startswith("|")}) == 2
    for figure in (result.figure(), result.curves_figure()):
        with (tmp_path / "figure.png").open("wb") as file:
            figure.savefig(file, format="png")


@pytest.mark.parametrize(
    "name", ["max_box_acc", "Grad-CAM++", "LayerCam (2)", "a.b", "IG, 20 steps"]
)
def test_usual_names_are_unchanged_in_markdown(name):
    estimate = Estimate(0.5, 0.25, 0.75, 4)
    counts = {name: 4}
    args = ({name: {name: estimate}}, {}, name, counts, {name: 0}, {}, {}, {name: True}, {name: {}})
    lines = Summary(*args).markdown().splitlines()
    assert lines[0] == f"| method | {name} ↑ | images |"
    assert lines[2].startswith(f"| {name} | 0.5")
