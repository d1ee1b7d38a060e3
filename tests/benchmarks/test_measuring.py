"""Tests of the helpers that the benchmarks share."""

import argparse
import sys

import pytest

from tests.benchmarks.measuring import parse_arguments


@pytest.mark.parametrize(
    ("flags", "size"), [([], 9), (["--quick"], 1), (["--quick", "--size", "4"], 4)]
)
def test_a_quick_run_replaces_the_defaults(
    flags: list[str], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=9)
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags])
    assert parse_arguments(parser, size=1).size == size
