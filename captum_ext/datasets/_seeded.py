"""Base class of the data sets that are drawn from a seed."""

from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_ext._checks import check_count
from captum_ext._errors import ArgumentError
from captum_ext._repr import options_repr
from captum_ext.datasets.examples import Example

Array = np.ndarray[Any, np.dtype[Any]]
Random = np.random.RandomState  # NumPy keeps its numbers the same in all versions
_ExampleT = TypeVar("_ExampleT", bound=Example)


class SeededDataset(Dataset[_ExampleT]):
    """Examples that depend on the seed, their index and the options alone.

    Args:
        n: the number of examples.
        seed: at least 0 and below 2**32.
        size: (height, width) of the pictures.

    Attributes:
        smallest_side: the least height and width.

    Raises:
        ValueError: an argument out of range.
    """

    smallest_side: ClassVar[int]

    def __init__(self, n: int, seed: int, size: tuple[int, int]) -> None:
        check_count("n", n)
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ArgumentError(f"`seed` must be an integer in [0, 2**32), got {seed!r}.", "seed")
        is_pair = isinstance(size, tuple | list) and len(size) == 2
        if not is_pair or min(size) < self.smallest_side:
            raise ArgumentError(
                f"`size` must be (height, width) of at least {self.smallest_side} pixels, got "
                f"{size}.",
                "size",
            )
        self.n, self.seed, self.size = n, seed, (size[0], size[1])

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[_ExampleT]:
        return (self[index] for index in range(self.n))

    def __repr__(self) -> str:
        return options_repr(self)

    def _checked_index(self, index: int) -> int:
        if not -self.n <= index < self.n:
            raise IndexError(f"example {index} of {self.n}")
        return index % self.n

    def _shuffled_class(self, index: int, n_classes: int) -> int:
        """The class of an example; each run of `n_classes` examples has every class once."""
        run, position = divmod(self._checked_index(index), n_classes)
        return int(Random([self.seed, 0, run]).permutation(n_classes)[position])


def box_around(mask: Array) -> Tensor:
    """The smallest box around the pixels of a mask (H, W): (1, 4), half-open."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], device="cpu")
