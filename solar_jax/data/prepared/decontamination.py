"""Decontamination: finds documents that share n consecutive words with an evaluation set.

Words are runs of letters and digits in lower case; punctuation and whitespace are ignored. Every text of a record of an
evaluation set counts, whatever its key.
"""

import dataclasses
import itertools
import re

import numpy as np

from solar_jax.data.prepared.evaluation_sets import Evaluations
from solar_jax.data.sources import Document
from solar_jax.errors import UserError

_WORD = re.compile(r"[^\W_]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Match:
    """A document that is dropped, and the reason."""

    document: str
    evaluation: str  # the record that it shares words with, the first if there are several
    words: str  # the n shared words of the first match
    places: int  # positions at which n consecutive words match an evaluation set


@dataclasses.dataclass(frozen=True)
class Index:
    """Index of all runs of n words in the evaluation sets."""

    n: int
    words: dict[str, int]  # word of the sets -> its number
    stream: np.ndarray  # [all words of all texts] int32
    hashes: np.ndarray  # [distinct runs] uint64, ascending
    begins: np.ndarray  # [distinct runs] int64, where the first such run begins in `stream`
    firsts: np.ndarray  # [texts + 1] int64, where each text begins
    records: np.ndarray  # [texts] int64, the record of each text
    names: list[str]  # [records] "FILE:RECORD"
    short: int  # records in which no text has n words, so that they match nothing

    def matches(self, document: Document) -> Match | None:
        """Returns the first run of n words that a document shares, or None; hash hits are verified word by word."""
        words = _words(document.text)
        numbers = np.array([self.words.get(word, -1) for word in words], np.int64)
        begins = _runs(numbers, self.n)
        if not len(begins):
            return None
        hashes = _hashes(numbers, begins, self.n)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        same = self.hashes[at] == hashes
        found = []
        for begin, run in zip(begins[same].tolist(), self.begins[at[same]].tolist(), strict=True):
            if np.array_equal(numbers[begin : begin + self.n], self.stream[run : run + self.n]):
                found.append((begin, run))
        if not found:
            return None
        begin, run = found[0]
        text = int(np.searchsorted(self.firsts, run, side="right")) - 1
        sample = " ".join(words[begin : begin + self.n])
        return Match(document.id, self.names[self.records[text]], sample, len(found))


def make_index(evaluations: Evaluations, n: int) -> Index:
    """Indexes the runs of n words of every text.

    Raises:
      UserError: there are no such runs.
    """
    words: dict[str, int] = {}
    names, texts, owners, short = [], [], [], 0
    for name, found in evaluations:
        numbered = [[words.setdefault(w, len(words)) for w in _words(text)] for text in found]
        short += all(len(text) < n for text in numbered)
        texts += numbered
        owners += [len(names)] * len(numbered)
        names.append(name)
    firsts = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    stream = np.array([w for text in texts for w in text], np.int64)
    begins = np.concatenate([np.arange(a, max(a, b - n + 1)) for a, b in itertools.pairwise(firsts)] or [[]]).astype(
        np.int64
    )
    if not len(begins):
        raise UserError(f"--decontaminate: none of {len(names)} records has {n} words in a row; lower --ngram.")
    hashes, first = np.unique(_hashes(stream, begins, n), return_index=True)
    return Index(
        n, words, stream.astype(np.int32), hashes, begins[first], firsts, np.array(owners, np.int64), names, short
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(numbers: np.ndarray, n: int) -> np.ndarray:
    """Returns the positions at which n consecutive known words begin."""
    if len(numbers) < n:
        return np.empty(0, np.int64)
    unknown = np.cumsum([0, *(numbers < 0)])
    return np.flatnonzero(unknown[n:] == unknown[:-n])


def _hashes(numbers: np.ndarray, begins: np.ndarray, n: int) -> np.ndarray:
    """Returns the hashes [begins] uint64 of the runs of n words that begin at `begins`."""
    values = _mixed(numbers.astype(np.uint64))
    found = np.zeros(len(begins), np.uint64)
    for k in range(n):
        found = found * _FACTOR + values[begins + k]
    return found


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mixes bits: numbers that differ in one bit map to numbers that differ in half of their bits."""
    for shift in (30, 27):
        x = (x ^ (x >> np.uint64(shift))) * _FACTOR
    return x ^ (x >> np.uint64(31))
