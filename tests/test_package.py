"""Imports of the package: which modules they load, and their direction."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import captum_ext
import captum_ext.attr
from captum_ext._errors import ArgumentError


def test_importing_the_methods_stays_light() -> None:
    code = (
        "import sys, captum_ext.attr;"
        "print([m for m in ('torchvision', 'torchmetrics', 'lightning', 'kornia', 'skimage')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_package_imports_its_parts_lazily() -> None:
    assert captum_ext.__version__
    assert captum_ext.attr.LayerCam is not None
    assert "imaging" in dir(captum_ext)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = captum_ext.nothing


def test_public_names_exist_once_and_have_docstrings() -> None:
    names = captum_ext.attr.__all__
    assert len(names) == len(set(names))
    assert all(getattr(captum_ext.attr, name).__doc__ for name in names)


def test_lower_bounds_of_all_dependencies_are_constraints() -> None:
    root = Path(captum_ext.__file__).parents[1]
    script = [sys.executable, root / ".ci/lower_bounds.py"]
    out = subprocess.run(script, cwd=root, capture_output=True, text=True, check=True).stdout
    bounds = dict(line.split("==") for line in out.splitlines())
    assert (bounds["torch"], bounds["lightning"], bounds["captum"]) == ("2.6", "2.6", "0.9")
    assert len(bounds) > 20
    assert "captum_ext" not in bounds


def imports_of(file: Path) -> set[str]:
    """The parts of the package that a file imports when it runs, at its top or inside functions."""
    tree = ast.parse(file.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in guarded:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            parts |= {name.split(".")[1] for name in names if name.startswith("captum_ext.")}
    return parts


def test_imports_point_one_way() -> None:
    """No part of the package imports one that imports it, but that `attr` exports FCAM."""
    root = Path(captum_ext.__file__).parent
    graph: dict[str, set[str]] = {}
    for file in root.rglob("*.py"):
        part = file.relative_to(root).with_suffix("").parts[0]
        graph.setdefault(part, set()).update(imports_of(file) - {part})
    assert "fcam" in imports_of(root / "attr" / "__init__.py")
    assert not any("fcam" in imports_of(file) for file in (root / "attr").glob("*/*.py"))
    graph["attr"].remove("fcam")
    assert not graph["attr"] & {
        "metrics",
        "evaluation",
        "cli",
        "datasets",
        "demo",
        "zoo",
        "features",
    }
    assert not graph["_engine"] & {"_data", "_identity", "attr"}
    order = list(TopologicalSorter(graph).static_order())  # a CycleError names a cycle
    assert not graph["fcam"] & {"evaluation", "cli"}
    assert order.index("attr") < min(order.index("fcam"), order.index("evaluation"))


def test_fcam_is_exported_lazily() -> None:
    code = (
        "import sys, captum_ext.attr as attr; assert 'captum_ext.fcam' not in sys.modules;"
        "from captum_ext.attr import FCAM; from captum_ext.fcam import FCAM as same;"
        "assert FCAM is same is attr.FCAM; assert not hasattr(attr, 'FCAN')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_error_names_the_argument_that_its_message_begins_with() -> None:
    assert ArgumentError("`size` must be positive.").argument == "size"
    assert ArgumentError("The maps do not fit `size`.").argument == ""
    assert ArgumentError("The maps do not fit.", "size").argument == "size"
