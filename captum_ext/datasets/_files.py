"""What the layouts of folders share: examples that are read late, text files, boxes, pictures."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_ext.datasets.examples import Example

if TYPE_CHECKING:
    from PIL.Image import Image

AnyPath = str | Path
Box = tuple[int, int, int, int]
_T = TypeVar("_T")


class LayoutFiles(Dataset[Example]):
    """Examples whose names and classes are known before their pictures are read.

    A layout that the shell opens in another way than by its constructor has `from_folder`.

    Attributes:
        labels: "all" where these must be all classes of a model, "nameless" where names may be
            given for them, "used" where there may be more of them, since labels are all that is
            known.
        has_objects: whether it is known where the objects are.
        samples: the file of each picture and its class, as torchvision's folders have them.
        names: of the examples.
        classes: the names of the classes, where the layout has them.
    """

    labels = "all"
    has_objects = True

    def __init__(
        self, samples: Sequence[tuple[AnyPath, int]], names: Sequence[str], classes: Sequence[str]
    ) -> None:
        self.samples = [(str(path), target) for path, target in samples]
        self.names, self.classes = list(names), tuple(classes)

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether a folder has the files of this layout."""
        return False

    @property
    def n_classes(self) -> int:
        """How many classes there are, as far as known."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        place = self._checked(index)
        path, target = self.samples[place]
        return self._example(place, self._image(path), target, self.names[place])

    def target(self, index: int) -> int:
        """The class of an example, without reading its picture."""
        return self.samples[self._checked(index)][1]

    def name(self, index: int) -> str:
        """The name of an example, without reading its picture."""
        return self.names[self._checked(index)]

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return index % len(self)

    def _image(self, path: str) -> "Image":
        from captum_ext._data.files import read_stored

        return read_stored(path, "RGB")

    def _example(self, place: int, image: "Image", target: int, name: str) -> Example:
        """With what is known of the object."""
        return Example(image, target, name)


# --- text files ----------------------------------------------------------------------------------


def finite_number(text: str) -> float:
    """A number; a ValueError where it is none, infinite or NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected a number, got {text!r}")
    return value


def read_rows(path: Path, split: Callable[[str], list[str]], n: int) -> list[list[str]]:
    """The fields of each line of a file that is not empty: n of them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        fields = split(line)
        if len(fields) != n:
            raise ValueError(f"{path}, line {number}: expected {n} fields, got {line!r}.")
        rows.append(fields)
    return rows


def read_table(
    path: Path,
    n: int,
    kind: Callable[[str], _T],
    keys: Iterable[str] | None = None,
    separator: str | None = None,
) -> dict[str, list[_T]]:
    """The n values that follow the key on each line; one line for each of `keys`, if given."""

    def split(line: str) -> list[str]:
        return line.split(None, n) if separator is None else line.rsplit(separator, n)

    rows = read_rows(path, split, n + 1)
    check_unique(path, [key for key, *_ in rows])
    try:
        table = {key: [kind(value.strip()) for value in values] for key, *values in rows}
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error
    if keys is not None:
        check_keys(path, table, keys)
    return table


def check_keys(path: Path, found: Iterable[str], keys: Iterable[str]) -> None:
    """Raise unless a file is about just those pictures that are listed."""
    there, wanted = set(found), set(keys)
    if there != wanted:
        lacking, unknown = sorted(wanted - there), sorted(there - wanted)
        parts = [f"lacks {some_of(lacking)}"] if lacking else []
        parts += [f"has {some_of(unknown)}"] if unknown else []
        raise ValueError(
            f"{path} must have each of the {len(wanted)} pictures that are listed, and no "
            f"other; it {' and '.join(parts)}."
        )


def check_unique(path: Path, keys: Iterable[str]) -> None:
    twice = [key for key, n in Counter(keys).items() if n > 1]
    if twice:
        raise ValueError(f"{path} has {some_of(twice)} more than once.")


def check_targets(path: Path, table: dict[str, list[int]], first: int, n: int | None) -> None:
    end = math.inf if n is None else first + n
    wrong = [key for key, (target,) in table.items() if not first <= target < end]
    if wrong:
        allowed = f"from {first} on" if n is None else f"from {first} to {first + n - 1}"
        raise ValueError(
            f"{path}: the class of {wrong[0]} is {table[wrong[0]][0]}; classes must be {allowed}."
        )


def some_of(keys: Sequence[str]) -> str:
    shown = ", ".join(map(repr, keys[:3]))
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


# --- boxes and pictures --------------------------------------------------------------------------


def outwards(x1: float, y1: float, x2: float, y2: float) -> Box:
    """The whole pixels that a box touches; 1e-6 of one is no more than rounding."""
    x1, y1, x2, y2 = (round(value, 6) for value in (x1, y1, x2, y2))
    return math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)


def cut_off(boxes: Sequence[Box], size: tuple[int, int], name: str) -> Tensor:
    """Boxes (n, 4) inside an image of (width, height)."""
    found = torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4)
    inside = found.clamp(min=torch.tensor(0), max=torch.tensor(size).repeat(2))
    if not bool((inside[:, :2] < inside[:, 2:]).all()):
        raise ValueError(
            f"a box of {name} is empty or outside the image of {size[0]} x {size[1]} pixels: "
            f"{found.tolist()}."
        )
    return inside


def read_mask(path: Path, size: tuple[int, int], above: int = 0) -> Tensor:
    """Which pixels of a grey picture, brought to (width, height), are above a value: (H, W)."""
    from PIL import Image

    from captum_ext._data.files import read_stored

    image = read_stored(path, "L")
    if image.size != size:
        image = image.resize(size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(image) > above)
