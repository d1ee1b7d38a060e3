"""Users' mistakes that `mypy` must name; user_script.py has the correct code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[2]

SET_UP = """
from torch import Tensor, nn
from captum_ext import attr
from captum_ext.attr import *

def mistakes(net: nn.Module, conv: nn.Conv2d, x: Tensor) -> None:
    single, several = LayerGradCamPlusPlus(net, "conv"), LayerCam(net, ["conv", "relu"])
"""
TAGET = r'Unexpected keyword argument "taget".*; did you mean "target"\?'
MISTAKES = {
    "single.attribute(x, taget=3)": TAGET,
    "several.attribute(x, taget=3)": TAGET,
    "LayerHiResCam(net, conv).attribute(x, taget=3)": TAGET,
    "LayerClassActivationMap(net, conv).attribute(x, taget=3)": TAGET,
    "LayerEigenCam(net, conv).attribute(x, taget=3)": TAGET,
    "LayerScoreCam(net, conv).attribute(x, taget=3)": TAGET,
    "LayerGroupCam(net, conv).attribute(x, taget=3)": TAGET,
    "LayerAblationCam(net, conv).attribute(x, taget=3)": TAGET,
    "RISE(net).attribute(x, taget=3)": TAGET,
    "FIDO(net).attribute(x, taget=3)": TAGET,
    "LayerScoreCam(net, conv).attribute(x, baseline=0)": 'did you mean "baselines"',
    "single.attribute(x).append(x)": '"Tensor" has no attribute "append"',
    "several.attribute(x).permute(0, 2, 3, 1)": r'"list\[Tensor\]" has no attribute "permute"',
    "UpsampleWrapper(single).attribute((x,)).mean()": r'"tuple\[Tensor, \.\.\.\]" has no',
    "FIDO(net).attribute(x, return_masks=True).mean()": r'"tuple\[Tensor, FIDOMasks\]" has no',
    "RISE(net).attribute((x, x)).mean()": r'"tuple\[Tensor, \.\.\.\]" has no',
    'LayerCam(net, ("conv", "relu"))': r'"LayerOrList" of "LayerCam" cannot be "tuple\[str, str\]"',
    "LayerCam(net, conv, n_samples=3)": 'Unexpected keyword argument "n_samples" for "LayerCam"',
    "attr.LayerCamm(net, conv)": 'Module has no attribute "LayerCamm"',
}


def test_mypy_names_each_mistake(tmp_path: Path) -> None:
    """One run of mypy checks all mistakes. With a warm cache it takes about a second."""
    script = tmp_path / "mistakes.py"
    script.write_text(SET_UP + "".join(f"    {line}\n" for line in MISTAKES))
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(script)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    first = SET_UP.count("\n") + 1
    for number, (line, message) in enumerate(MISTAKES.items(), first):
        assert re.search(rf"mistakes\.py:{number}: error: .*{message}", out), f"{line}\n{out}"
    numbers = {int(n) for n in re.findall(r"mistakes\.py:(\d+): error", out)}
    assert numbers == set(range(first, first + len(MISTAKES))), out
