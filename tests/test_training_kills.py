"""Trainings that are killed at any moment go on to the same weights, to the bit."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def kills(kind: str, *moments: str) -> None:
    """Kill trainings at these moments, in a process of their own; see `training_kills`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.training_kills", kind, *moments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == len(moments)


@pytest.mark.parametrize(
    ("kind", "moments"),
    [
        ("fcam", ["SIGKILL:write:1", "SIGKILL:write:3", "SIGTERM:batch:5"]),
        ("perception", ["SIGKILL:write:2", "SIGKILL:rename:1", "SIGINT:batch:7"]),
    ],
)
def test_a_killed_training_goes_on_to_the_same_weights(kind: str, moments: list[str]) -> None:
    """The first file that F-CAM writes is its cache. Signals come in the middle of a file, too."""
    kills(kind, *moments)


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT", "SIGTERM"])
@pytest.mark.parametrize("kind", ["fcam", "perception"])
def test_thirty_kills_at_random_moments(kind: str, number: str) -> None:
    draw = random.Random(f"{kind} {number}")
    events = [f"batch:{n}" for n in (1, 3, 4, 9, 12)]
    if number != "SIGTERM":  # which waits until the batch ends, when the file is complete
        events += [f"write:{n}" for n in (1, 2, 3, 4)]
    times = [f"time:{draw.random():.3f}" for _ in range(30 - len(events))]
    kills(kind, *(f"{number}:{moment}" for moment in events + times))
