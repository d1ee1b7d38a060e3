"""The random masks of RISE."""

import math

import torch
from torch import Generator, Tensor

from captum_ext._checks import check_count, is_finite
from captum_ext._engine.precision import full_precision, without_autocast
from captum_ext._errors import ArgumentError
from captum_ext.imaging import resize

BLOCK = 256  # masks whose random numbers are drawn together; RISE may stop after each block


class GridMasks:
    """Random masks of the spatial size of `x`, in [0, 1] and of mean `p`: upsampled random grids.

    Args:
        x: (B, C, *spatial).
        grid: cells along each spatial dimension, or one number for all.
        p: the probability that a cell is 1.
        generator: of all random numbers.

    Raises:
        ValueError: `p` outside (0, 1); a grid without whole numbers of cells, or finer than `x`.
    """

    def __init__(
        self, x: Tensor, grid: int | tuple[int, ...], p: float, generator: Generator | None
    ) -> None:
        size = tuple(x.shape[2:])
        cells = grid if isinstance(grid, tuple | list) else (grid,) * len(size)
        if not is_finite(p) or not 0 < p < 1:
            raise ArgumentError(f"`p` must be a number greater than 0 and less than 1, got {p!r}.")
        if len(cells) != len(size):
            raise ArgumentError(f"`grid` must have a number for each of {size}, got {grid!r}.")
        for n in cells:
            check_count("grid", n)
        if any(n > pixels for n, pixels in zip(cells, size, strict=True)):
            raise ArgumentError(f"`grid` is finer than the inputs' {size}: got {grid!r}.")
        self.cells, self.p, self.generator = tuple(cells), p, generator
        self.device = x.device
        self.shifts = [math.ceil(pixels / n) for n, pixels in zip(cells, size, strict=True)]
        self.pixels = [torch.arange(pixels, device=x.device) for pixels in size]
        # Bilinear upsampling is a product with one small matrix for each dimension. Rows of that
        # matrix crop the mask, so that a chunk of masks with different shifts needs no loop.
        self.upsampling = [
            resize(
                torch.eye(n, dtype=full_precision(x).dtype, device=x.device)[:, None],
                ((n + 1) * shift if shift > 1 else n,),
            )[:, 0].T.contiguous()
            for n, shift in zip(cells, self.shifts, strict=True)
        ]
        self.numbers: Tensor | None = None

    def __call__(self, start: int, stop: int) -> Tensor:
        """The masks from `start` to `stop`, (stop - start, *spatial), in one block and in order."""
        n_cells = math.prod(self.cells)
        if start % BLOCK == 0:
            self.numbers = torch.rand(
                BLOCK, n_cells + len(self.cells), generator=self.generator, device=self.device,
                dtype=torch.float32,
            )  # fmt: skip
        assert self.numbers is not None
        first = start - start % BLOCK
        numbers = self.numbers[start - first : stop - first]
        is_shown = numbers[:, :n_cells] < self.p
        masks = is_shown.reshape(-1, *self.cells).to(self.upsampling[0])
        with without_autocast(masks):
            for dim, (matrix, shift, pixels) in enumerate(
                zip(self.upsampling, self.shifts, self.pixels, strict=True), 1
            ):
                if shift > 1:
                    first_row = (numbers[:, n_cells + dim - 1] * shift).long().clamp(max=shift - 1)
                    rows = matrix[first_row[:, None] + pixels]  # (n, pixels, cells)
                    cells = masks.movedim(dim, 1)
                    crops = rows @ cells.reshape(len(masks), cells.shape[1], -1)
                    masks = crops.reshape(crops.shape[:2] + cells.shape[2:]).movedim(1, dim)
        return masks.clamp(max=1)  # TF32, if it is switched on, may round the weights up


def chunk_bounds(n_masks: int, size: int) -> list[tuple[int, int]]:
    """Start and stop of the masks of each pass. Passes are about equal parts of the blocks."""
    chunks = []
    for first in range(0, n_masks, BLOCK):
        count = min(BLOCK, n_masks - first)
        step = math.ceil(count / math.ceil(count / size))
        stop = first + count
        chunks += [(start, min(start + step, stop)) for start in range(first, stop, step)]
    return chunks
