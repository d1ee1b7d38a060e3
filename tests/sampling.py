"""A small part of a product of options that still has every pair of them."""

from collections.abc import Hashable, Sequence
from itertools import combinations

Row = tuple[Hashable, ...]


def pairs_of(row: Row) -> set[tuple[Hashable, ...]]:
    """The pairs of a row's entries, each entry with its column."""
    return set(combinations(enumerate(row), 2))


def cover_pairs(rows: Sequence[Row]) -> list[Row]:
    """The rows that are needed so that every pair of entries in any row is in one of them.

    Greedy and deterministic: the next row is always the first of those with most new pairs.
    """
    pairs = {row: pairs_of(row) for row in rows}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        row = max(rows, key=lambda row: len(pairs[row] & missing))
        chosen.append(row)
        missing -= pairs[row]
    return chosen
