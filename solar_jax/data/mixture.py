"""Mixture of sources: the source of the row at each position is a pure function of the position, in exact shares."""

import sys
from collections.abc import Sequence
from typing import Any, SupportsIndex

import grain

_PARTS = 1 << 40  # sum of the shares, up to rounding


def row_shares(weights: Sequence[float], tokens: Sequence[float]) -> list[int]:
    """Returns the row shares that give each source a share of the tokens proportional to `weights`.

    Args:
      weights: [sources]
      tokens: [sources] average tokens per row of each source.

    Returns:
      [sources] positive integers.
    """
    rows = [weight / count for weight, count in zip(weights, tokens, strict=True)]
    return [max(1, round(_PARTS * r / sum(rows))) for r in rows]


def rows_of(shares: Sequence[int], rows: int) -> list[int]:
    """Returns how many of the first `rows` positions each source has."""
    found = []
    remaining = sum(shares)
    for share in shares:
        others = rows * (remaining - share) // remaining
        found.append(rows - others)
        rows, remaining = others, remaining - share
    return found


class Mixture:
    """Maps each position to (source, element of it): the first source gets its share of all positions, evenly spread,
    the second its share of the remaining ones, and so on."""

    def __init__(self, parts: Sequence[grain.MapDataset], shares: Sequence[int]):
        self._parts, self._shares = parts, shares

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: SupportsIndex) -> tuple[int, int]:
        at, remaining = int(index), sum(self._shares)
        for source, share in enumerate(self._shares):
            # How many of the first `at` remaining positions, and of the first `at` + 1, are not this source's.
            before = at * (remaining - share) // remaining
            after = (at + 1) * (remaining - share) // remaining
            if before == after:
                element: Any = self._parts[source][at - before]
                return source, element
            at, remaining = before, remaining - share
        raise AssertionError
