"""Answers that an evaluation has, kept in a file of JSON lines, so that a killed one goes on."""

import base64
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from solar_jax.evaluation.trie import TrieRow
from solar_jax.monitoring.metrics import JsonLines
from solar_jax.parallel import processes

Scores = tuple[np.ndarray, np.ndarray]  # log-probabilities float32 [W] and bool [W], whether greedy


class Store:
    """Answers by what was asked. The first process reads and writes the file; all have its content."""

    def __init__(self, file: pathlib.Path):
        """Reads what the file has.

        Args:
          file: appended to; a line that a kill cut short is ignored.
        """
        self._file = JsonLines(file) if processes.is_first() else None
        found = json.dumps([[r["key"], r["value"]] for r in self._file.read()]) if self._file else ""
        self._known: dict[str, Any] = dict(json.loads(processes.text_from_first(found)))

    def __len__(self) -> int:
        return len(self._known)

    def scores(self, key: str) -> Scores | None:
        found = self._known.get(key)
        if found is None:
            return None
        log_probs, greedy = (base64.b64decode(text) for text in found)
        return np.frombuffer(log_probs, np.float32), np.frombuffer(greedy, bool)

    def add_scores(self, key: str, scores: Scores) -> None:
        self._add(key, [base64.b64encode(np.ascontiguousarray(part).tobytes()).decode() for part in scores])

    def text(self, key: str) -> str | None:
        return self._known.get(key)

    def add_text(self, key: str, text: str) -> None:
        self._add(key, text)

    def _add(self, key: str, value: Any) -> None:
        self._known[key] = value
        if self._file:
            self._file.append({"key": key, "value": value})
            self._file.flush()


def key_of_row(row: TrieRow, wanted: list[tuple[int, int]]) -> str:
    """The key of a row's scores: everything that they depend on beside the model."""
    parts = (row.tokens, row.positions, row.chains, row.attached, [x for pair in wanted for x in pair])
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.array([len(part), *part], np.int32).tobytes())
    return digest.hexdigest()


def key_of_text(*asked: Any) -> str:
    """The key of a generated text."""
    return hashlib.sha256(repr(asked).encode()).hexdigest()
