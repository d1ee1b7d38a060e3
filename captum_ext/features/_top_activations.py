"""The largest activations of each unit over a data set, kept on the device as it streams by."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_ext._checks import check_count
from captum_ext._engine.precision import full_precision

_NOTHING = torch.iinfo(torch.int64).max  # the key of an entry that is not there


class TopActivations:
    """The `n` largest activations of each channel, and where they were.

    What it holds does not grow with the number of images. Of equal activations the earlier place
    comes first, and of one image the earlier position, row by row: neither the order in which
    images come nor how they are batched or shared out changes the result. A place that comes again,
    as the samplers of several processes repeat some, counts once.

    Args:
        n: how many are kept of each channel. 9 is customary.
        per_image: how many of them may be of one image.

    Raises:
        ValueError: an argument below 1.

    Example:
        >>> top = TopActivations(n=2)
        >>> maps = torch.tensor([[[[1.0, 7.0], [7.0, 0.0]]], [[[2.0, 3.0], [1.0, 8.0]]]])
        >>> top.update(maps, torch.tensor([0, 1]))
        >>> top.values, top.places, top.positions.tolist()
        (tensor([[8., 7.]]), tensor([[1, 0]]), [[[1, 1], [0, 1]]])
    """

    def __init__(self, n: int = 9, per_image: int = 1) -> None:
        check_count("n", n)
        check_count("per_image", per_image)
        self.n, self.per_image = n, per_image
        self.grid: tuple[int, int] | None = None
        # Each row is sorted: values, and keys (place x cells + cell), which order equal values.
        # They are replaced and never written to, so that states may share them.
        self._values, self._keys = torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64)

    @torch.no_grad()
    def update(self, activations: Tensor, places: Tensor) -> None:
        """See the activations of some images.

        Args:
            activations: (B, C, h, w), of floats. C and (h, w) are the same each time.
            places: (B,), int64: where the images are in the data set, each another one.

        Raises:
            ValueError: tensors of other shapes or kinds; activations that are not finite; places
                that are negative or come twice.
        """
        if activations.dim() != 4 or not activations.is_floating_point() or not activations.numel():
            raise ValueError(
                f"`activations` must be (B, C, h, w) of floats, got {tuple(activations.shape)}, "
                f"{activations.dtype}."
            )
        if places.shape != activations.shape[:1] or places.dtype != torch.int64:
            raise ValueError(
                f"`places` must be int64 and ({len(activations)},), one for each image, got "
                f"{places.dtype}, {tuple(places.shape)}."
            )
        if bool((places < 0).any()) or len(places.unique()) < len(places):
            raise ValueError(f"`places` must differ and be 0 or more, got {places.tolist()}.")
        flat = activations.detach().flatten(2)
        is_finite = torch.isfinite(flat)
        if not bool(is_finite.all()):
            bad = (~is_finite).flatten(1).any(1).nonzero().flatten()
            raise ValueError(
                f"The activations of {len(bad)} images are not finite; the first is at place "
                f"{int(places[bad[0].to(places.device)])}."
            )
        self._check_like((activations.shape[2], activations.shape[3]), activations.shape[1])
        found: list[tuple[Tensor, Tensor]] = []
        for i in range(min(self.per_image, flat.shape[2])):
            if i:
                flat = flat.scatter(2, found[-1][1][:, :, None], -torch.inf)
            best = flat.max(2)  # the first of equal ones
            found.append((best.values, best.indices))
        values = full_precision(torch.stack([value for value, _ in found], 2))
        cells = torch.stack([cell for _, cell in found], 2)
        keys = places.to(cells.device)[:, None, None] * flat.shape[2] + cells
        self._keep(values.transpose(0, 1).flatten(1), keys.transpose(0, 1).flatten(1))

    @torch.no_grad()
    def merge(self, other: "TopActivations") -> None:
        """See what another one has seen, of other images.

        Raises:
            ValueError: it keeps another number, or has seen another layer.
        """
        if (self.n, self.per_image) != (other.n, other.per_image):
            raise ValueError(
                f"`other` keeps {other.n}, {other.per_image} of an image, and this one {self.n}, "
                f"{self.per_image} of an image."
            )
        if other.grid is not None:
            self._check_like(other.grid, len(other._values))
            device = self._values.device if len(self._values) else other._values.device
            self._keep(other._values.to(device), other._keys.to(device))

    def _check_like(self, grid: tuple[int, int], channels: int) -> None:
        if self.grid is not None and (self.grid, len(self._values)) != (grid, channels):
            raise ValueError(
                f"The activations have {channels} channels of {grid}, and those before had "
                f"{len(self._values)} of {self.grid}."
            )
        self.grid = grid

    def _keep(self, values: Tensor, keys: Tensor) -> None:
        """The best of what is kept and of this, (C, m) each."""
        if len(self._values):
            values = torch.cat([self._values.to(values), values], 1)
            keys = torch.cat([self._keys.to(keys.device), keys], 1)
        keys, order = keys.sort(dim=1, stable=True)
        values = values.gather(1, order)
        group = keys // self._cells if self.per_image == 1 else keys
        again = group[:, 1:] == group[:, :-1]
        values[:, 1:].masked_fill_(again, -torch.inf)
        keys[:, 1:].masked_fill_(again, _NOTHING)
        values, order = values.sort(dim=1, descending=True, stable=True)
        self._values = values[:, : self.n].contiguous()
        self._keys = keys.gather(1, order)[:, : self.n].contiguous()

    @property
    def _cells(self) -> int:
        assert self.grid is not None
        return self.grid[0] * self.grid[1]

    def _found(self, kept: Tensor) -> Tensor:
        """Without the ends that are not there; every channel has seen as many images."""
        return kept[:, : int((self._keys != _NOTHING).sum(1).min())] if len(kept) else kept

    @property
    def values(self) -> Tensor:
        """(C, m), the largest first, in float32 or float64. m is `n`, or less of few images."""
        return self._found(self._values)

    @property
    def places(self) -> Tensor:
        """(C, m), int64, of the images."""
        return self._found(self._keys) // (self._cells if self.grid else 1)

    @property
    def positions(self) -> Tensor:
        """(C, m, 2), int64: row and column in the map."""
        if self.grid is None:
            return torch.zeros(0, 0, 2, dtype=torch.int64)
        cells = self._found(self._keys) % self._cells
        return torch.stack([cells // self.grid[1], cells % self.grid[1]], 2)

    def state_dict(self) -> dict[str, Any]:
        """All that it has seen, in tensors on the CPU and plain values."""
        return {
            "n": self.n,
            "per_image": self.per_image,
            "grid": self.grid,
            "values": self._values.cpu(),
            "keys": self._keys.cpu(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "TopActivations":
        """One that goes on from what `state_dict` gave."""
        top = cls(state["n"], state["per_image"])
        top.grid = None if state["grid"] is None else (state["grid"][0], state["grid"][1])
        top._values, top._keys = state["values"], state["keys"]
        return top
