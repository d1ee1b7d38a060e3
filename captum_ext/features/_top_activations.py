"""The largest activations of each unit over a data set, collected batch by batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_ext._checks import check_count
from captum_ext._deprecation import warn_renamed
from captum_ext._engine.precision import full_precision
from captum_ext._errors import ArgumentError
from captum_ext._repr import options_repr, short_repr
from captum_ext._tensor_files import is_complete

_MISSING = torch.iinfo(torch.int64).max  # the key of an empty entry


class TopActivations:
    """Collects the `n` largest activations of each channel, with their images and positions.

    Its size does not grow with the number of images. Ties go to the image with the lower index, and
    in one image to the earlier position, row by row. So the result depends neither on the order of
    the images nor on their batches or processes. An image that comes again counts once: the
    samplers of several processes repeat some.

    Args:
        n: the number of activations of each channel. 9 (Zeiler & Fergus 2014).
        per_image: how many of them may be of one image. 1.

    Raises:
        ValueError: an argument is not an integer of at least 1.

    Example:
        >>> top = TopActivations(n=2)
        >>> maps = torch.tensor([[[[1.0, 7.0], [7.0, 0.0]]], [[[2.0, 3.0], [1.0, 8.0]]]])
        >>> top.update(maps, torch.tensor([0, 1]))
        >>> top.values, top.indices, top.positions.tolist()
        (tensor([[8., 7.]]), tensor([[1, 0]]), [[[1, 1], [0, 1]]])
    """

    def __init__(self, n: int = 9, per_image: int = 1) -> None:
        check_count("n", n)
        check_count("per_image", per_image)
        self.n, self.per_image = n, per_image
        self.grid: tuple[int, int] | None = None
        # Rows are sorted by value, then by key, which is (index of the image x cells + cell). Both
        # tensors are replaced and never written to, so that states may share them.
        self._values = torch.zeros(0, 0, dtype=torch.float32, device="cpu")
        self._keys = torch.zeros(0, 0, dtype=torch.int64, device="cpu")

    def __repr__(self) -> str:
        return options_repr(self)

    @torch.no_grad()
    def update(
        self, activations: Tensor, indices: Tensor | None = None, *, places: Tensor | None = None
    ) -> None:
        """Add the activations of a batch of images.

        Args:
            activations: (B, C, h, w), floats. C, h and w are the same each time.
            indices: (B,), int64: the images' indices in the data set, without repetition.
            places: the old name of `indices`.

        Raises:
            ValueError: the tensors have other shapes or dtypes, the activations are not finite, or
                indices are negative or repeated.
        """
        if places is not None:
            warn_renamed("places", "indices")
            indices = places
        if activations.dim() != 4 or not activations.is_floating_point() or not activations.numel():
            raise ArgumentError(
                f"`activations` must be (B, C, h, w) of floats, got {tuple(activations.shape)}, "
                f"{activations.dtype}.",
                "activations",
            )
        is_index = isinstance(indices, Tensor) and indices.dtype == torch.int64
        if indices is None or not is_index or indices.shape != activations.shape[:1]:
            raise ArgumentError(
                f"`indices` must be int64 and ({len(activations)},), one for each image, got "
                f"{short_repr(indices)}.",
                "indices",
            )
        if bool((indices < 0).any()) or len(indices.unique()) < len(indices):
            raise ArgumentError(
                f"`indices` must differ and be 0 or more, got {indices.tolist()}.", "indices"
            )
        flat = activations.detach().flatten(2)
        is_finite = torch.isfinite(flat).flatten(1).all(1).to(indices.device)
        if not bool(is_finite.all()):
            raise ValueError(
                f"The activations of {int((~is_finite).sum())} images are not finite; the first "
                f"has the index {int(indices[~is_finite][0])}."
            )
        self._check_like((activations.shape[2], activations.shape[3]), activations.shape[1])
        maxima: list[tuple[Tensor, Tensor]] = []
        for i in range(min(self.per_image, flat.shape[2])):
            if i:
                flat = flat.scatter(2, maxima[-1][1][:, :, None], -torch.inf)
            values, cells = flat.max(2)  # takes the first of several maxima
            maxima.append((values, cells))
        values, cells = (torch.stack(parts, 2) for parts in zip(*maxima, strict=True))
        values = full_precision(values)
        keys = indices.to(cells.device)[:, None, None] * flat.shape[2] + cells
        self._keep(values.transpose(0, 1).flatten(1), keys.transpose(0, 1).flatten(1))

    @torch.no_grad()
    def merge(self, other: "TopActivations") -> None:
        """Add the activations of another collector, which has seen other images.

        Args:
            other: a collector with the same `n` and `per_image`, of the same layer.

        Raises:
            ValueError: `other` has another `n`, `per_image` or layer.
        """
        if (self.n, self.per_image) != (other.n, other.per_image):
            raise ArgumentError(
                f"`other` keeps {other.n} activations, {other.per_image} of an image; this "
                f"collector keeps {self.n}, {self.per_image} of an image.",
                "other",
            )
        if other.grid is not None:
            self._check_like(other.grid, len(other._values))
            device = self._values.device if len(self._values) else other._values.device
            self._keep(other._values.to(device), other._keys.to(device))

    def _check_like(self, grid: tuple[int, int], channels: int) -> None:
        if self.grid is not None and (self.grid, len(self._values)) != (grid, channels):
            raise ValueError(
                f"The activations have {channels} channels of {grid}, but earlier ones had "
                f"{len(self._values)} of {self.grid}."
            )
        self.grid = grid

    def _keep(self, values: Tensor, keys: Tensor) -> None:
        """Merge values and keys, (C, m) each, with those of before, and keep the largest."""
        if len(self._values):
            values = torch.cat([self._values.to(values), values], 1)
            keys = torch.cat([self._keys.to(keys.device), keys], 1)
        keys, order = keys.sort(dim=1, stable=True)
        values = values.gather(1, order)
        groups = keys // self._n_cells if self.per_image == 1 else keys
        is_repeated = groups[:, 1:] == groups[:, :-1]
        values[:, 1:].masked_fill_(is_repeated, -torch.inf)
        keys[:, 1:].masked_fill_(is_repeated, _MISSING)
        values, order = values.sort(dim=1, descending=True, stable=True)
        self._values = values[:, : self.n].contiguous()
        self._keys = keys.gather(1, order)[:, : self.n].contiguous()

    @property
    def _n_cells(self) -> int:
        assert self.grid is not None
        return self.grid[0] * self.grid[1]

    def _without_missing(self, rows: Tensor) -> Tensor:
        """Rows without empty entries, which all channels have in equal number."""
        return rows[:, : int((self._keys != _MISSING).sum(1).min())] if len(rows) else rows

    @property
    def values(self) -> Tensor:
        """(C, m), the largest first, in float32 or float64. m is `n`, or less for few images."""
        return self._without_missing(self._values)

    @property
    def indices(self) -> Tensor:
        """(C, m), int64: the images' indices in the data set."""
        return self._without_missing(self._keys) // (self._n_cells if self.grid else 1)

    @property
    def places(self) -> Tensor:
        """The old name of `indices`."""
        warn_renamed("places", "indices")
        return self.indices

    @property
    def positions(self) -> Tensor:
        """(C, m, 2), int64: row and column in the layer's map."""
        if self.grid is None:
            return self._keys.new_zeros(0, 0, 2)
        cells = self._without_missing(self._keys) % self._n_cells
        return torch.stack([cells // self.grid[1], cells % self.grid[1]], 2)

    def state_dict(self) -> dict[str, Any]:
        """The collector's state, as tensors on the CPU and plain values."""
        return {
            "n": self.n,
            "per_image": self.per_image,
            "grid": self.grid,
            "values": self._values.cpu(),
            "keys": self._keys.cpu(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "TopActivations":
        """A collector with the state of another one's `state_dict`.

        Raises:
            ValueError: `state` is not one of `state_dict`.
        """
        names = {"n", "per_image", "grid", "values", "keys"}
        if not isinstance(state, Mapping) or not names <= state.keys():
            raise ArgumentError(f"`state` must have {', '.join(sorted(names))}.", "state")
        top = cls(state["n"], state["per_image"])
        grid, values, keys = state["grid"], state["values"], state["keys"]
        is_grid = isinstance(grid, tuple | list) and len(grid) == 2
        for side in grid if is_grid else ():
            check_count("grid", side)
        if not is_complete(values) or not is_complete(keys):
            raise ArgumentError("`state` must have dense tensors `values` and `keys`.", "state")
        is_missing = keys == _MISSING
        if (
            not (is_grid or (grid is None and not values.numel()))
            or not values.is_floating_point()
            or keys.dtype != torch.int64
            or values.dim() != 2
            or values.shape != keys.shape
            or values.shape[1] > top.n
            or bool((keys < 0).any())
            or not torch.equal(torch.isfinite(values), ~is_missing)
            or bool((values[:, 1:] > values[:, :-1]).any())
        ):
            raise ArgumentError(
                "`state` must have finite `values` (C, m) in descending order, with int64 `keys` "
                "of 0 or more.",
                "state",
            )
        top.grid = None if grid is None else (grid[0], grid[1])
        top._values, top._keys = values, keys
        return top
