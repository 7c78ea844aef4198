"""Losses that a search has, kept in a file of JSON lines beside its result, so that a killed one goes on."""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from solar_jax.monitoring.metrics import JsonLines
from solar_jax.parallel import processes


def search_key(*settings: Any) -> str:
    """Returns a hash of everything that a search's losses and order depend on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class LossStore:
    """Sums by document, [documents] float64, of a text and a cut. The first process reads and writes the file."""

    def __init__(self, file: pathlib.Path | None):
        """Reads what the file has.

        Args:
          file: appended to; a line that a kill cut short is ignored. None keeps nothing.
        """
        self._file = JsonLines(file) if file is not None and processes.is_first() else None
        found = json.dumps([[r["key"], r["value"]] for r in self._file.read()]) if self._file else "[]"
        self._known: dict[str, Any] = dict(json.loads(processes.text_from_first(found)))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> np.ndarray | None:
        found = self._known.get(key)
        return None if found is None else np.array(found, np.float64)

    def add(self, key: str, sums: np.ndarray) -> None:
        """Keeps a value; JSON holds a float64 exactly."""
        self._known[key] = sums.tolist()
        if self._file:
            self._file.append({"key": key, "value": self._known[key]})
            self._file.flush()
