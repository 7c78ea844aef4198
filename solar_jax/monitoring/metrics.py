"""Metrics files: JSON Lines on a disk or in a bucket."""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

from solar_jax.errors import UserError
from solar_jax.parallel import processes
from solar_jax.storage import paths
from solar_jax.storage.paths import is_local

_PUT_SECONDS = 30.0  # minimum interval between uploads of a growing object


class JsonLines:
    """JSON Lines file, held in memory by every process and written only by the first.

    On a disk each line is written as soon as it is appended. An object in a bucket cannot be appended to: it is
    rewritten in full, periodically and on `flush`. All processes must append and drop the same lines.
    """

    def __init__(self, file: pathlib.Path):
        """Reads the existing file, so no process may be writing to it yet."""
        self.file = file
        self._writes, self._local = processes.is_first(), is_local(file)
        self._records, self._torn = self._stored()
        self._changed, self._put_at = False, time.monotonic()

    def _stored(self) -> tuple[list[dict[str, Any]], bool]:
        """Returns the file's complete lines, and whether a crash cut the last one short."""
        text, records = paths.read_text(self.file) or "", []
        for line in text.splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records, bool(text) and not text.endswith("\n")

    def read(self) -> list[dict[str, Any]]:
        """Returns the lines, without one that a crash cut short."""
        return list(self._records)

    def keep_if(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Drops all other lines, such as those of steps that a resumed run will repeat."""
        self._records = [r for r in self._records if condition(r)]
        self._changed = True
        if self._local:
            self.flush()

    def append(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        if not self._writes:
            return
        if not self._local:
            self._changed = True
            if time.monotonic() - self._put_at >= _PUT_SECONDS:
                with contextlib.suppress(UserError):  # training continues; `flush` raises if the bucket stays down
                    self._put()
        elif self._torn:
            self._put()
        else:
            with open(self.file, "a") as f:
                f.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Blocks until every line is stored.

        Raises:
          UserError: the bucket does not accept them.
        """
        if self._writes and self._changed:
            self._put()

    def _put(self) -> None:
        self._put_at = time.monotonic()  # time of the attempt, so that a failing bucket is not retried at every step
        paths.write_file(self.file, "".join(json.dumps(r) + "\n" for r in self._records))
        self._changed = self._torn = False
