"""Base class of the public layouts, and readers of their text files, boxes and masks."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_ext._checks import first_line
from captum_ext._errors import ArgumentError
from captum_ext._repr import bounded_repr, options_repr
from captum_ext.datasets.examples import Example

if TYPE_CHECKING:
    from PIL.Image import Image

AnyPath = str | Path
Box = tuple[int, int, int, int]
_LONGEST_PATH = 4096  # characters
_T = TypeVar("_T")


class LayoutDataset(Dataset[Example]):
    """A data set in a public layout, whose names and classes are known before pictures are read.

    A layout may have a class method `from_folder`, which the shell calls in place of the
    constructor.

    Attributes:
        labels: how the classes of the layout relate to those of a model. "all": they are all
            classes. "nameless": they are all classes, and the caller may give their names. "used":
            the model may have more classes than the labels in the files.
        has_objects: whether boxes or masks are known.
        root: the folder.
        samples: the file of each picture and its class, as in torchvision's folders.
        names: the names of the examples.
        classes: the names of the classes, or () if the layout has none.
    """

    labels = "all"
    has_objects = True
    root: AnyPath

    def __init__(
        self, samples: Sequence[tuple[AnyPath, int]], names: Sequence[str], classes: Sequence[str]
    ) -> None:
        self.samples = [(str(path), target) for path, target in samples]
        self.names, self.classes = list(names), tuple(classes)

    @classmethod
    def matches(cls, folder: Path) -> bool:
        """Return whether a folder has the files of this layout."""
        return False

    @property
    def n_classes(self) -> int:
        """The number of classes, as far as it is known."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        # The attributes of these names may come from the files.
        parameters = signature(type(self)).parameters
        from_files = {
            name: parameters[name].default
            for name in ("classes", "n_classes")
            if name in parameters
        }
        return options_repr(self, root=str(self.root), **from_files)

    def __getitem__(self, index: int) -> Example:
        index = self._checked_index(index)
        path, target = self.samples[index]
        return self._make_example(index, self._read_image(path), target, self.names[index])

    def target(self, index: int) -> int:
        """The class of an example, without reading its picture."""
        return self.samples[self._checked_index(index)][1]

    def name(self, index: int) -> str:
        """The name of an example, without reading its picture."""
        return self.names[self._checked_index(index)]

    def _checked_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return index % len(self)

    def _read_image(self, path: str) -> "Image":
        from captum_ext._data.files import read_stored

        return read_stored(path)

    def _make_example(self, index: int, image: "Image", target: int, name: str) -> Example:
        """Make an example with the boxes and masks that the layout has."""
        return Example(image, target, name)


# --- text files ----------------------------------------------------------------------------------


def finite_number(text: str) -> float:
    """Read a finite number, or raise a ValueError."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected a number, got {bounded_repr(text)}")
    return value


def read_rows(path: Path, split: Callable[[str], list[str]], n: int) -> list[list[str]]:
    """Read the n fields of each line of a file, without its empty lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line with another number of fields, or bytes that are no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}.") from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        fields = split(line)
        if len(fields) != n:
            raise ValueError(
                f"{path}, line {number}: expected {n} fields, got {bounded_repr(line)}."
            )
        rows.append(fields)
    return rows


def read_table(
    path: Path,
    n: int,
    parse: Callable[[str], _T],
    keys: Iterable[str] | None = None,
    separator: str | None = None,
) -> dict[str, list[_T]]:
    """Read a file with a key and n values on each line.

    Args:
        path: the file.
        n: the number of values.
        parse: turns the text of a value into the value, or raises a ValueError.
        keys: the keys that the file must have, each once. None allows any.
        separator: between the fields; None is white space.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a wrong line, value or key.
    """

    def split(line: str) -> list[str]:
        return line.split(None, n) if separator is None else line.rsplit(separator, n)

    rows = read_rows(path, split, n + 1)
    check_unique(path, [key for key, *_ in rows])
    try:
        table = {key: [parse(value.strip()) for value in values] for key, *values in rows}
    except ValueError as error:
        raise ValueError(f"{path}: {first_line(error)}.") from error
    if keys is not None:
        check_keys(path, table, keys)
    return table


def check_keys(path: Path, keys: Iterable[str], expected: Iterable[str]) -> None:
    """Raise a ValueError unless a file has the expected pictures and no others."""
    lacking, unknown = sorted({*expected} - {*keys}), sorted({*keys} - {*expected})
    if lacking or unknown:
        parts = [f"lacks {first_of(lacking)}"] if lacking else []
        parts += [f"has {first_of(unknown)}"] if unknown else []
        raise ValueError(
            f"{path} must have each of the {len({*expected})} pictures that are listed, and no "
            f"other; it {' and '.join(parts)}."
        )


def check_unique(path: Path, keys: Iterable[str]) -> None:
    """Raise a ValueError unless the keys of a file are distinct."""
    repeated = [key for key, n in Counter(keys).items() if n > 1]
    if repeated:
        raise ValueError(f"{path} has {first_of(repeated)} more than once.")


def check_inside(path: Path, names: Iterable[str]) -> None:
    """Raise an ArgumentError unless the names in a file stay inside the data set's folder."""
    for name in names:
        parts = name.replace("\\", "/").split("/")
        is_inside = parts[0] and ".." not in parts and not Path(name).drive
        if not is_inside or "\0" in name or len(name) > _LONGEST_PATH:
            raise ArgumentError(
                f"{path} names {bounded_repr(name)}, which is outside of the data set's folder or "
                f"no path: names must be relative, without '..'.",
                "root",
            )


def check_targets(path: Path, table: dict[str, list[int]], first: int, n: int | None) -> None:
    """Raise a ValueError unless the classes in a file are n numbers from `first` on."""
    end = math.inf if n is None else first + n
    wrong = [key for key, (target,) in table.items() if not first <= target < end]
    if wrong:
        allowed = f"from {first} on" if n is None else f"from {first} to {first + n - 1}"
        raise ValueError(
            f"{path}: the class of {first_line(wrong[0])} is {bounded_repr(table[wrong[0]][0])}; "
            f"classes must be {allowed}."
        )


def first_of(keys: Sequence[str]) -> str:
    """The first three of the keys and the number of the others, for an error message."""
    listed = ", ".join(bounded_repr(key) for key in keys[:3])
    return listed if len(keys) <= 3 else f"{listed} and {len(keys) - 3} more"


# --- boxes and pictures --------------------------------------------------------------------------


def round_outwards(x1: float, y1: float, x2: float, y2: float) -> Box:
    """Round a box to the pixels that it touches, after rounding to 1e-6."""
    x1, y1, x2, y2 = (round(value, 6) for value in (x1, y1, x2, y2))
    return math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)


def clip_boxes(boxes: Sequence[Box], size: tuple[int, int], name: str) -> Tensor:
    """Clip boxes to the image `name` of (width, height): (n, 4).

    Raises:
        ValueError: a box that is empty or outside the image.
    """
    # Clipped as Python's integers: those of a file may have more than 64 bits.
    clipped = [
        [min(max(corner, 0), side) for corner, side in zip(box, size * 2, strict=True)]
        for box in boxes
    ]
    inside = torch.tensor(clipped, dtype=torch.int64, device="cpu").reshape(-1, 4)
    if not bool((inside[:, :2] < inside[:, 2:]).all()):
        raise ValueError(
            f"a box of {name} is empty or outside the image of {size[0]} x {size[1]} pixels: "
            f"{bounded_repr(boxes)}."
        )
    return inside


def read_mask(path: Path, size: tuple[int, int], above: float = 0.0) -> Tensor:
    """Read a mask, mark its values above a share of white, and resize it to (width, height)."""
    from PIL import Image

    from captum_ext._data.files import read_picture
    from captum_ext._data.modes import to_mask

    marked = Image.fromarray(read_picture(path, lambda image: to_mask(image, above)))
    if marked.size != size:
        marked = marked.resize(size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(marked))
