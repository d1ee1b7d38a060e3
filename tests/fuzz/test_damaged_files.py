"""Data sets and stored files whose bytes are damaged: a clear error, or what could be read."""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_ext._data.files import read_upright
from captum_ext.datasets import ClassFolders, Coco, Cub, Voc, WsolFolder
from tests.fuzz.properties import fuzz

OPEN: dict[str, Callable[[Path], Iterable[Any]]] = {
    "photographs": lambda folder: ClassFolders(folder / "photographs"),
    "cub": lambda folder: Cub(folder / "CUB_200_2011", split="all"),
    "voc": lambda folder: Voc(folder / "VOC2007"),
    "coco": lambda folder: Coco(folder / "coco"),
    "wsol": lambda folder: WsolFolder(folder / "metadata", folder / "dataset"),
    "open_images": lambda folder: WsolFolder(
        folder / "metadata", folder / "images", "val", masks=folder / "masks"
    ),
}
WORDS = [b"", b"\n", b",", b" ", b"0", b"-1", b"nan", b"1e999", b"9" * 30, b"../../etc/passwd"]
WORDS += [
    b"\xff\xfe",
    b"\x00",
    b"[",
    b"{",
    b"<",
    b'"',
    b"null",
    b"true",
    b"a" * 5000,
    b"\r",
    b"1.5",
]


def damages() -> st.SearchStrategy[Callable[[bytes], bytes]]:
    """Functions of a file's bytes: cut, overwritten, repeated, or with a word put in."""
    share = st.floats(0, 1)

    def cut(content: bytes, at: float) -> bytes:
        return content[: int(at * len(content))]

    def put(content: bytes, at: float, word: bytes, over: int) -> bytes:
        i = int(at * len(content))
        return content[:i] + word + content[i + over :]

    def swap_lines(content: bytes, at: float) -> bytes:
        lines = content.split(b"\n")
        i = int(at * (len(lines) - 1))
        return b"\n".join([*lines[i:], *lines[:i]])

    def drop_line(content: bytes, at: float) -> bytes:
        lines = content.split(b"\n")
        del lines[int(at * (len(lines) - 1))]
        return b"\n".join(lines)

    return st.one_of(
        share.map(lambda at: lambda content: cut(content, at)),
        st.tuples(share, st.sampled_from(WORDS), st.integers(0, 8)).map(
            lambda args: lambda content: put(content, *args)
        ),
        share.map(lambda at: lambda content: swap_lines(content, at)),
        share.map(lambda at: lambda content: drop_line(content, at)),
        st.just(lambda content: content + content),
    )


def read_all(layout: str, folder: Path) -> None:
    """Read all examples. Errors are those of a data set: they name a file, or the argument."""
    refusal: ValueError | OSError | None = None
    examples: list[Any] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            examples = list(OPEN[layout](folder))
    except (ValueError, OSError) as error:
        refusal = error
    if refusal is not None:
        message = str(refusal)
        names = {str(folder), "`", *(path.stem for path in folder.rglob("*.*"))}
        assert any(name in message for name in names), "an error that names nothing"
        assert isinstance(refusal, OSError) or len(message) < 1000
    for example in examples:
        assert example.image.mode == "RGB"
        size = (example.image.height, example.image.width)
        for mask in (example.mask, example.ignored):
            assert mask is None or (mask.dtype == torch.bool and mask.shape == size)
        if example.boxes is not None:
            assert bool(torch.isfinite(example.boxes.double()).all())
            x1, y1, x2, y2 = example.boxes.T
            assert bool((x1 >= 0).all() & (y1 >= 0).all() & (x1 < x2).all() & (y1 < y2).all())
            assert bool((x2 <= size[1]).all() & (y2 <= size[0]).all())


@pytest.mark.parametrize("layout", OPEN)
@fuzz
@given(data=st.data())
def test_a_damaged_data_set_is_read_or_refused(
    layout: str, data: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    request.getfixturevalue(layout)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    texts = [path for path in files if path.suffix in (".txt", ".xml", ".json")]
    damaged = data.draw(st.sampled_from(texts + files))
    try:
        damaged.write_bytes(data.draw(damages())(before[damaged]))
        read_all(layout, tmp_path)
    finally:
        damaged.write_bytes(before[damaged])


@fuzz
@given(damage=damages(), more=damages(), suffix=st.sampled_from(["jpg", "png"]))
def test_a_damaged_picture_is_read_or_refused(
    damage: Any, more: Any, suffix: str, photographs: Path
) -> None:
    content = next(photographs.rglob(f"*.{suffix}")).read_bytes()
    path = photographs / f"damaged.{suffix}"
    path.write_bytes(more(damage(content)))
    refusal = ""
    try:
        image = read_upright(path)
    except OSError as error:
        refusal = str(error)
    assert str(path) in refusal if refusal else image.mode == "RGB"


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("cub", "CUB_200_2011/train_test_split.txt"),
        ("voc", "VOC2007/ImageSets/Main/test.txt"),
        ("wsol", "metadata/test/class_labels.txt"),
    ],
)
def test_a_list_that_is_not_utf_8_is_named(
    layout: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    request.getfixturevalue(layout)
    (tmp_path / name).write_bytes(b"\xff\xfe1 1\n")
    with pytest.raises(ValueError, match=rf"{Path(name).name} is not a text in UTF-8"):
        list(OPEN[layout](tmp_path))
