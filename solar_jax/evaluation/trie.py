"""Rows in which sequences share the computation of the tokens that they begin with.

A row is a trie of tokens, laid out so that each token stands behind its parent. A chain is a run of tokens, each the
child of the one before it; a token sees its chain up to itself, and of each chain above the part up to where the path
to it leaves. Positions count along the path, so that each sequence is computed as if it stood alone.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

NOT_SEEN = -1


@dataclasses.dataclass(frozen=True)
class Query:
    """A sequence, and the tokens in it whose probability is asked."""

    tokens: tuple[int, ...]  # that the model reads
    targets: tuple[int, ...]  # expected after each of its last tokens

    @property
    def first(self) -> int:
        """The place of the token after which the first target is expected."""
        return len(self.tokens) - len(self.targets)


@dataclasses.dataclass
class TrieRow:
    """A row that is being filled; `ask` holds where each query's targets are read."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    chains: list[int] = dataclasses.field(default_factory=list)  # of each token
    attached: list[int] = dataclasses.field(default_factory=list)  # of each chain: the token it hangs on, or NOT_SEEN
    ask: dict[int, list[int]] = dataclasses.field(default_factory=dict)  # query -> places of its targets

    _children: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)  # (parent, token) -> place

    def missing(self, query: Query) -> int:
        """How many tokens of a query the row does not have yet."""
        at = NOT_SEEN
        for i, token in enumerate(query.tokens):
            at = self._children.get((at, token), -2)
            if at == -2:
                return len(query.tokens) - i
        return 0

    def add(self, number: int, query: Query) -> None:
        """Adds a query, of which only the tokens that are missing take space."""
        at, places = NOT_SEEN, []
        for i, token in enumerate(query.tokens):
            place = self._children.get((at, token))
            if place is None:
                place = self._append(at, token, i)
            if i >= query.first:
                places.append(place)
            at = place
        self.ask[number] = places

    def _append(self, parent: int, token: int, position: int) -> int:
        place = len(self.tokens)
        if parent != place - 1 or parent == NOT_SEEN:
            self.attached.append(parent)
        self.chains.append(len(self.attached) - 1)
        self.tokens.append(token)
        self.positions.append(position)
        self._children[parent, token] = place
        return place

    def mask(self, size: int) -> np.ndarray:
        """The tokens that each token sees, bool [T, T] with T = `size`; padding sees itself."""
        chains, at = np.array(self.chains, np.int32), np.arange(len(self.tokens))
        found = np.eye(size, dtype=bool)
        found[: len(at), : len(at)] = at[None, :] <= np.minimum(at[:, None], self.limits()[chains][:, chains])
        return found

    def limits(self) -> np.ndarray:
        """The last place that each chain sees of each other, int32 [chains, chains]; its own is not limited here."""
        count = len(self.attached)
        found = np.full((count, count), NOT_SEEN, np.int32)
        for chain, parent in enumerate(self.attached):
            if parent != NOT_SEEN:
                above = self.chains[parent]
                found[chain] = found[above]  # chains above were begun before
                found[chain, above] = parent
            found[chain, chain] = len(self.tokens)
        return found


def pack_queries(queries: Sequence[Query], budget: int, *, share: bool = True) -> Iterator[TrieRow]:
    """Packs queries into rows of at most `budget` tokens and as many targets, or of queries that share more than that.

    Queries are taken in the order of their tokens, so that those with the longest common beginnings meet. A query that
    has most of its tokens in a row is added a quarter beyond the budget, too: elsewhere it would cost them again.

    Args:
      queries: what is asked.
      budget: tokens of a row.
      share: compute common beginnings once; otherwise each query has a row of its own.
    """
    row, targets, first = TrieRow(), 0, 0
    for number in _ordered(queries) if share else range(len(queries)):
        query = queries[number]
        missing = row.missing(query)
        most = max(budget, first) * 5 // 4 if 2 * missing < len(query.tokens) else budget
        full = len(row.tokens) + missing > most or targets + len(query.targets) > budget
        if row.ask and (full or not share):
            yield row
            row, targets, first = TrieRow(), 0, 0
        row.add(number, query)
        first = first or len(query.tokens)
        targets += len(query.targets)
    if row.ask:
        yield row


def _ordered(queries: Sequence[Query]) -> Iterable[int]:
    return sorted(range(len(queries)), key=lambda number: queries[number].tokens)
