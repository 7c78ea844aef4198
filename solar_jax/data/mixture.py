"""Which source gives the row at each place of a mixture: a pure function of the place, in exact shares."""

import sys
from collections.abc import Sequence
from typing import Any, SupportsIndex

import grain

_PARTS = 1 << 40  # that a whole is divided into


def row_shares(weights: Sequence[float], tokens: Sequence[float]) -> list[int]:
    """Shares of the rows with which the sources' shares of the tokens are as `weights`.

    Args:
      weights: [sources]
      tokens: [sources] that a row of each source has on average.

    Returns:
      [sources] integers above 0.
    """
    rows = [weight / count for weight, count in zip(weights, tokens, strict=True)]
    return [max(1, round(_PARTS * r / sum(rows))) for r in rows]


def rows_of(shares: Sequence[int], rows: int) -> list[int]:
    """How many of the first `rows` places each source has."""
    found = []
    remaining = sum(shares)
    for share in shares:
        others = rows * (remaining - share) // remaining
        found.append(rows - others)
        rows, remaining = others, remaining - share
    return found


class Mixture:
    """(source, element of it) at every place: the first source has its share of all places, evenly spread, the second
    its share of what that leaves, and so on."""

    def __init__(self, parts: Sequence[grain.MapDataset], shares: Sequence[int]):
        self._parts, self._shares = parts, shares

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: SupportsIndex) -> tuple[int, int]:
        at, remaining = int(index), sum(self._shares)
        for source, share in enumerate(self._shares):
            # Of the first `at` places that are left, and of one more, those that are not this source's.
            before = at * (remaining - share) // remaining
            after = (at + 1) * (remaining - share) // remaining
            if before == after:
                element: Any = self._parts[source][at - before]
                return source, element
            at, remaining = before, remaining - share
        raise AssertionError
