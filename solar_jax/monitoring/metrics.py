"""What a run records and shows: FLOPs and MFU, metrics files, the loss picture."""

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

_PUT_SECONDS = 30.0  # between two puts of a growing object


class JsonLines:
    """A file of one JSON object a line, held in memory by every process and written by the first alone.

    On a disk each line is there as soon as it is appended. An object of a bucket cannot be appended to: it is put anew
    as a whole, now and then, and by `flush`. The processes have to append and drop the same.
    """

    def __init__(self, file: pathlib.Path):
        """Reads what is there, so that no process may be writing yet."""
        self.file = file
        self._writes, self._local = processes.is_first(), is_local(file)
        self._records, self._torn = self._stored()
        self._changed, self._put_at = False, time.monotonic()

    def _stored(self) -> tuple[list[dict[str, Any]], bool]:
        """The whole lines of the file, and whether a crash cut the last one short."""
        text, records = paths.read_text(self.file) or "", []
        for line in text.splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records, bool(text) and not text.endswith("\n")

    def read(self) -> list[dict[str, Any]]:
        """The lines there are; one that a crash cut short is left out."""
        return list(self._records)

    def keep_if(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Drops the other lines, as those of steps that a resumed run will take again."""
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
                with contextlib.suppress(UserError):  # the steps go on; `flush` tells of a bucket that stays away
                    self._put()
        elif self._torn:
            self._put()
        else:
            with open(self.file, "a") as f:
                f.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Returns when every line is stored.

        Raises:
          UserError: the bucket does not take them.
        """
        if self._writes and self._changed:
            self._put()

    def _put(self) -> None:
        self._put_at = time.monotonic()  # of the try, so that a bucket that fails is not asked at every step
        paths.write_file(self.file, "".join(json.dumps(r) + "\n" for r in self._records))
        self._changed = self._torn = False
