"""The connected regions of a map's masks at all thresholds at once: the nodes of one tree.

In what follows `levels` (H, W) says how many thresholds are below a pixel: mask k is levels > k.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

N_THRESHOLDS = 1000

Array = np.ndarray[Any, np.dtype[Any]]
_EIGHT = np.ones((3, 3))  # neighbours


@dataclass(frozen=True)
class Regions:
    """Connected regions: each is one of mask k for start <= k < stop."""

    start: Array
    stop: Array
    first: Array  # pixel, row by row
    boxes: Array  # (n, 4), half-open
    tree: Any
    nodes: Array

    def sums(self, amounts: Array) -> Array:
        """Over the pixels of each region, of amounts (H * W, ...)."""
        import higra as hg

        sums: Array = hg.accumulate_sequential(self.tree, amounts, hg.Accumulators.sum)
        return sums[self.nodes]


def regions_of(levels: Array, neighbours: int) -> Regions:
    """The regions of all masks, of pixels with 4 or 8 neighbours: the nodes of the max-tree."""
    import higra as hg

    graphs = {4: hg.get_4_adjacency_implicit_graph, 8: hg.get_8_adjacency_implicit_graph}
    tree, stop = hg.component_tree_max_tree(
        graphs[neighbours](levels.shape), levels.astype(np.int16)
    )
    stop = stop.astype(np.int64)
    start = stop[tree.parents()]
    start[-1] = 0  # of the root, the whole image
    nodes = tree.num_leaves() + np.flatnonzero((start < stop)[tree.num_leaves() :])
    index, width = np.arange(levels.size, dtype=np.int32), levels.shape[1]
    ends = np.stack((index, index % width, -index, -(index % width)), 1)
    ends = hg.accumulate_sequential(tree, ends, hg.Accumulators.min)[nodes].astype(np.int64)
    first, left, last, right = ends.T * [[1], [1], [-1], [-1]]
    boxes = np.stack((left, first // width, right + 1, last // width + 1), 1)
    return Regions(start[nodes], stop[nodes], first, boxes, tree, nodes)


def holes_of(levels: Array) -> tuple[Array, Array, Array]:
    """Start and stop of all holes in regions, and the boxes of their outlines on the regions."""
    holes = regions_of(N_THRESHOLDS - levels, neighbours=4)
    height, width = levels.shape
    inner = (holes.boxes > 0).all(1) & (holes.boxes[:, 2:] < [width, height]).all(1)
    start, stop = N_THRESHOLDS - holes.stop[inner], N_THRESHOLDS - holes.start[inner]
    return start, stop, holes.boxes[inner] + [-1, -1, 1, 1]


def leaders(start: Array, stop: Array, *keys: Array) -> Array:
    """Which region is the greatest in each mask, by the last key first; -1 where there is none."""
    order = np.lexsort(keys)
    rank = np.argsort(order)
    # Any span of masks is two, overlapping, of 2**p: ranks[p, k] is for masks k to k + 2**p.
    power = np.frexp(stop - start)[1] - 1
    ranks = np.full((N_THRESHOLDS.bit_length(), N_THRESHOLDS), -1)
    np.maximum.at(ranks, (power, start), rank)
    np.maximum.at(ranks, (power, stop - 2**power), rank)
    for p in range(len(ranks) - 1, 0, -1):
        half = 2 ** (p - 1)
        ranks[p - 1] = np.maximum(ranks[p - 1], ranks[p])
        ranks[p - 1, half:] = np.maximum(ranks[p - 1, half:], ranks[p, :-half])
    found: Array = np.append(order, -1)[ranks[0]]
    return found


# --- areas within outlines -----------------------------------------------------------------------


def outlined_areas(levels: Array, regions: Regions) -> Array:
    """The area within each region's outline, or less where that cannot make it the largest.

    Without a hole it is the region's own area, else between that and its box's: holes are filled
    only where more than one region of a mask may be the largest.
    """
    from scipy import ndimage

    areas: Array
    areas, euler = regions.sums(_by_squares(levels)).T
    sides = regions.boxes[:, 2:] - regions.boxes[:, :2] - 1
    most = np.where(euler == 1, areas, sides.prod(1))
    # What the largest of each mask has at least; from mask to mask, which are nested, it falls.
    least = np.zeros(N_THRESHOLDS)
    np.maximum.at(least, regions.stop - 1, areas)
    least = np.maximum.accumulate(least[::-1])[::-1]
    # A region may be the largest of mask k for since <= k < stop.
    since = np.maximum(regions.start, np.searchsorted(-least, -most)).clip(max=regions.stop)
    begin, end = (np.bincount(k, minlength=N_THRESHOLDS + 1) for k in (since, regions.stop))
    rivals = (begin - end).cumsum()
    contested = np.append(0, (rivals > 1).cumsum())
    for i in np.flatnonzero((euler < 1) & (contested[regions.stop] > contested[since])):
        x1, y1, x2, y2 = regions.boxes[i]
        labels, _ = ndimage.label(levels[y1:y2, x1:x2] > regions.start[i], _EIGHT)
        areas[i] = _outlined_area(labels == labels[0, regions.first[i] % levels.shape[1] - x1])
    return areas


def _by_squares(levels: Array) -> Array:
    """What each pixel adds to the area and to the Euler number of the regions it is in: (H * W, 2).

    The area within a region's outline, holes apart, is a half for each square of four pixels of
    which three are in the region, and 1 where all are. The Euler number, 1 less the number of
    holes, is pixels - pairs side by side - squares with just a diagonal in the region + full
    squares. A pair is in the regions that its lower pixel is in, a full square in those of its
    lowest; a diagonal, in those of its lower pixel, is no longer alone in those of a third.
    """
    bits = levels.size.bit_length()
    kind: Any = np.int32 if bits + N_THRESHOLDS.bit_length() < 32 else np.int64
    pixels = np.arange(levels.size, dtype=kind).reshape(levels.shape)
    order = (levels.astype(kind) << bits) + pixels  # without ties
    beside = np.minimum(order[:, 1:], order[:, :-1]), np.maximum(order[:, 1:], order[:, :-1])
    (low, lower), (high, higher) = ((pair[:-1], pair[1:]) for pair in beside)
    between = np.maximum(low, lower), np.minimum(high, higher)
    is_black = np.add.outer(*map(np.arange, levels.shape)).ravel() % 2 == 0  # of a chessboard

    def pixel(order: Array) -> Array:
        found: Array = (order & (2**bits - 1)).ravel()
        return found

    def count(pixels: Array) -> Array:
        return np.bincount(pixels, minlength=levels.size)

    lowest, second = count(pixel(np.minimum(low, lower))), pixel(np.minimum(*between))
    third, highest = pixel(np.maximum(*between)), pixel(np.maximum(high, higher))
    diagonal = is_black[third] == is_black[highest]
    area = 0.5 * (lowest + count(second))
    euler = 1 - count(pixel(beside[0])) - count(pixel(np.minimum(order[1:], order[:-1]))) + lowest
    euler += count(second[diagonal]) - count(third[diagonal])
    return np.stack((area, euler), 1)


def _outlined_area(region: Array) -> float:
    """The area of the polygon through the centres of a region's outermost pixels.

    Of each square of four neighbouring pixels, holes filled, it takes all if four are in the
    region, a half if three are, and else nothing.
    """
    from scipy import ndimage

    outside, _ = ndimage.label(np.pad(~region, 1, constant_values=True))
    filled = (outside != outside[0, 0]).astype(np.int64)
    four = filled[1:, 1:] + filled[1:, :-1] + filled[:-1, 1:] + filled[:-1, :-1]
    return float((four == 4).sum() + 0.5 * (four == 3).sum())
