"""Names of pictures, methods and metrics in CSV, Markdown and figures."""

import csv

import numpy as np
import pytest

from captum_ext.evaluation import evaluate
from captum_ext.evaluation.export import escape_cell, unescape_cell
from captum_ext.evaluation.results import Band, Estimate, Summary
from tests.evaluation.subjects import QUIET, Boxes, FixedMap
from tests.networks import tiny_net

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
