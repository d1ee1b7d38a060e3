"""Finished runs, each test's own copy."""

import shutil

import pytest

from tests.evaluation.subjects import METRICS, evaluate_boxes


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    """A run of one metric, and one of all kinds of cells."""
    folder = tmp_path_factory.mktemp("finished")
    evaluate_boxes(folder / "energy")
    evaluate_boxes(folder / "all", metrics=METRICS)
    return folder


@pytest.fixture
def run(finished_runs, tmp_path):
    """The folder of a finished run."""
    return shutil.copytree(finished_runs / "energy", tmp_path / "run")


@pytest.fixture
def run_of_all(finished_runs, tmp_path):
    return shutil.copytree(finished_runs / "all", tmp_path / "run")
