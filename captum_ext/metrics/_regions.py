"""Connected regions of a map's masks at all thresholds at once, as nodes of one tree.

A map is given as `levels` (H, W), the number of thresholds below each pixel. Mask k is levels > k.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

N_THRESHOLDS = 1000

Array = np.ndarray[Any, np.dtype[Any]]
_EIGHT_NEIGHBOURS = np.ones((3, 3))


@dataclass(frozen=True)
class RegionTree:
    """The n connected regions of all masks.

    Attributes:
        start: (n,): the region is in the masks start <= k < stop.
        stop: (n,).
        first: (n,): the index of the region's first pixel, row by row.
        boxes: (n, 4): (x1, y1, x2, y2), half-open.
        tree: Higra's tree.
        nodes: (n,): the region's node in the tree.
    """

    start: Array
    stop: Array
    first: Array
    boxes: Array
    tree: Any
    nodes: Array

    def sum_pixels(self, amounts: Array) -> Array:
        """Sums of amounts (H * W, ...) over the pixels of each region: (n, ...)."""
        import higra as hg

        sums: Array = hg.accumulate_sequential(self.tree, amounts, hg.Accumulators.sum)
        return sums[self.nodes]


def find_regions(levels: Array, neighbours: int) -> RegionTree:
    """Find the regions of all masks, of pixels with 4 or 8 neighbours, as nodes of the max-tree."""
    import higra as hg

    graphs = {4: hg.get_4_adjacency_implicit_graph, 8: hg.get_8_adjacency_implicit_graph}
    tree, stop = hg.component_tree_max_tree(
        graphs[neighbours](levels.shape), levels.astype(np.int16)
    )
    stop = stop.astype(np.int64)
    start = stop[tree.parents()]
    start[-1] = 0  # The last node is the root, which is the whole image.
    nodes = tree.num_leaves() + np.flatnonzero((start < stop)[tree.num_leaves() :])
    index, width = np.arange(levels.size, dtype=np.int32), levels.shape[1]
    ends = np.stack((index, index % width, -index, -(index % width)), 1)
    ends = hg.accumulate_sequential(tree, ends, hg.Accumulators.min)[nodes].astype(np.int64)
    first, left, last, right = ends.T * [[1], [1], [-1], [-1]]
    boxes = np.stack((left, first // width, right + 1, last // width + 1), 1)
    return RegionTree(start[nodes], stop[nodes], first, boxes, tree, nodes)


def find_holes(levels: Array) -> tuple[Array, Array, Array]:
    """Find the holes in regions: start, stop, and the box of the region's pixels around each."""
    holes = find_regions(N_THRESHOLDS - levels, neighbours=4)
    height, width = levels.shape
    inner = (holes.boxes > 0).all(1) & (holes.boxes[:, 2:] < [width, height]).all(1)
    start, stop = N_THRESHOLDS - holes.stop[inner], N_THRESHOLDS - holes.start[inner]
    return start, stop, holes.boxes[inner] + [-1, -1, 1, 1]


def greatest_regions(start: Array, stop: Array, *keys: Array) -> Array:
    """Find the index of the greatest region in each mask; -1 for a mask without a region.

    The last key decides first, as for `np.lexsort`.
    """
    order = np.lexsort(keys)
    rank = np.argsort(order)
    # Two overlapping spans of 2**p masks cover any span; ranks[p, k] is for masks k to k + 2**p.
    power = np.frexp(stop - start)[1] - 1
    ranks = np.full((N_THRESHOLDS.bit_length(), N_THRESHOLDS), -1)
    np.maximum.at(ranks, (power, start), rank)
    np.maximum.at(ranks, (power, stop - 2**power), rank)
    for p in range(len(ranks) - 1, 0, -1):
        half = 2 ** (p - 1)
        ranks[p - 1] = np.maximum(ranks[p - 1], ranks[p])
        ranks[p - 1, half:] = np.maximum(ranks[p - 1, half:], ranks[p, :-half])
    greatest: Array = np.append(order, -1)[ranks[0]]
    return greatest


# --- areas within outlines -----------------------------------------------------------------------


def outlined_areas(levels: Array, regions: RegionTree) -> Array:
    """The area within each region's outline; less for a region that cannot be the largest anyway.

    The area of a region without a hole is its own. That of a region with holes is between its own
    and its box's. Holes are filled only where more than one region of a mask may be the largest.
    """
    from scipy import ndimage

    areas: Array
    areas, euler = regions.sum_pixels(_area_and_euler_number(levels)).T
    sides = regions.boxes[:, 2:] - regions.boxes[:, :2] - 1
    most = np.where(euler == 1, areas, sides.prod(1))
    # A lower bound of the largest area in each mask. Masks are nested, so that it falls with k.
    least = np.zeros(N_THRESHOLDS)
    np.maximum.at(least, regions.stop - 1, areas)
    least = np.maximum.accumulate(least[::-1])[::-1]
    # A region may be the largest of mask k where since <= k < stop.
    since = np.maximum(regions.start, np.searchsorted(-least, -most)).clip(max=regions.stop)
    begin, end = (np.bincount(k, minlength=N_THRESHOLDS + 1) for k in (since, regions.stop))
    rivals = (begin - end).cumsum()
    contested = np.append(0, (rivals > 1).cumsum())
    for i in np.flatnonzero((euler < 1) & (contested[regions.stop] > contested[since])):
        x1, y1, x2, y2 = regions.boxes[i]
        labels, _ = ndimage.label(levels[y1:y2, x1:x2] > regions.start[i], _EIGHT_NEIGHBOURS)
        areas[i] = _polygon_area(labels == labels[0, regions.first[i] % levels.shape[1] - x1])
    return areas


def _area_and_euler_number(levels: Array) -> Array:
    """The share of each pixel in the area and the Euler number of its regions: (H * W, 2).

    The area within a region's outline, without holes, adds up over squares of four pixels. A square
    with three pixels in the region adds a half, a full one adds 1. The Euler number is 1 less the
    number of holes: pixels - pairs side by side - squares with just a diagonal in the region + full
    squares. A pair is in the regions of its lower pixel, a full square in those of its lowest. A
    diagonal is in the regions of its lower pixel, and alone there until a third pixel joins.
    """
    bits = levels.size.bit_length()
    dtype: Any = np.int32 if bits + N_THRESHOLDS.bit_length() < 32 else np.int64
    pixels = np.arange(levels.size, dtype=dtype).reshape(levels.shape)
    order = (levels.astype(dtype) << bits) + pixels  # without ties
    beside = np.minimum(order[:, 1:], order[:, :-1]), np.maximum(order[:, 1:], order[:, :-1])
    (low, lower), (high, higher) = ((pair[:-1], pair[1:]) for pair in beside)
    between = np.maximum(low, lower), np.minimum(high, higher)
    is_black = np.add.outer(*map(np.arange, levels.shape)).ravel() % 2 == 0  # of a chessboard

    def pixel_of(order: Array) -> Array:
        pixel: Array = (order & (2**bits - 1)).ravel()
        return pixel

    def count(pixels: Array) -> Array:
        return np.bincount(pixels, minlength=levels.size)

    lowest, second = count(pixel_of(np.minimum(low, lower))), pixel_of(np.minimum(*between))
    third, highest = pixel_of(np.maximum(*between)), pixel_of(np.maximum(high, higher))
    diagonal = is_black[third] == is_black[highest]
    area = 0.5 * (lowest + count(second))
    below = np.minimum(order[1:], order[:-1])
    euler = 1 - count(pixel_of(beside[0])) - count(pixel_of(below)) + lowest
    euler += count(second[diagonal]) - count(third[diagonal])
    return np.stack((area, euler), 1)


def _polygon_area(region: Array) -> float:
    """The area of the polygon through the centres of a region's outermost pixels.

    Holes are filled first. A square of four neighbouring pixels then adds 1 if all four are in the
    region, a half if three are, and else nothing.
    """
    from scipy import ndimage

    outside, _ = ndimage.label(np.pad(~region, 1, constant_values=True))
    filled = (outside != outside[0, 0]).astype(np.int64)
    four = filled[1:, 1:] + filled[1:, :-1] + filled[:-1, 1:] + filled[:-1, :-1]
    return float((four == 4).sum() + 0.5 * (four == 3).sum())
