"""Pairs of packed rows: their keys, and the log-probabilities that a reference model gives them."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from solar_jax.data.packing import Row

LogProbs = Mapping[str, tuple[float, float]]  # by a pair's key: of the chosen and the rejected answer, in nats
Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens [N] of both sequences, their sizes [2], trained [N] bool


class Sequences(Protocol):
    """Packed rows of records, however they are stored."""

    def __getitem__(self, index: int) -> Row: ...

    def sequences(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]: ...


def pairs_of(rows: Sequences, index: int) -> Iterator[tuple[str, Pair]]:
    """Yields the key and the tokens of each pair of a row, in its order."""
    tokens, sizes, trained = rows.sequences(index)
    assert trained is not None
    ends = np.cumsum(sizes)
    for i in range(0, len(sizes), 2):
        of = slice(int(ends[i] - sizes[i]), int(ends[i + 1]))
        pair = tokens[of].astype(np.int32), sizes[i : i + 2].astype(np.int64), trained[of]
        yield pair_key(pair), pair


def pair_key(pair: Pair) -> str:
    """A hash of everything that a pair's log-probabilities depend on, but the model."""
    return hashlib.blake2b(b"".join(x.tobytes() for x in pair), digest_size=12).hexdigest()


def row_with(rows: Sequences, index: int, known: LogProbs | None) -> Row:
    """A row, with "reference" [T] float32 where log-probabilities are known.

    That has each sequence's log-probability at its first token, and 0 elsewhere.
    """
    row = rows[index]
    if known is None:
        return row
    reference, at = np.zeros(len(row["tokens"]), np.float32), 0
    for key, (_, sizes, _) in pairs_of(rows, index):
        for size, value in zip(sizes.tolist(), known[key], strict=True):
            reference[at] = value
            at += size - 1
    return row | {"reference": reference}
