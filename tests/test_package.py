"""What importing the package costs and shows."""

import subprocess
import sys

import pytest

import captum_ext
import captum_ext.attr


def test_importing_the_methods_stays_light() -> None:
    code = (
        "import sys, captum_ext.attr;"
        "print([m for m in ('torchvision', 'torchmetrics', 'lightning', 'kornia', 'skimage')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_top_imports_its_parts_when_asked() -> None:
    assert captum_ext.__version__
    assert captum_ext.attr.LayerCam is not None
    assert "imaging" in dir(captum_ext)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = captum_ext.nothing


def test_public_names_exist_once_and_have_docstrings() -> None:
    names = captum_ext.attr.__all__
    assert len(names) == len(set(names))
    assert all(getattr(captum_ext.attr, name).__doc__ for name in names)
