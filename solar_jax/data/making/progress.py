"""Progress of a job in its folder: what was begun, and a line for every question that is finished."""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from solar_jax.data.making.steps import Finished, Outcome
from solar_jax.errors import UserError
from solar_jax.storage.json_files import read_json_object, write_json

JOB_FILE, PROGRESS_FILE = "job.json", "progress.jsonl"
TOTALS = ("requests", "retries", "tokens_in", "tokens_out")  # numbers of `Finished` that are added up
_FLUSH_EVERY = 1.0  # seconds; most that a power cut loses


def check_job(out: pathlib.Path, job: dict[str, Any]) -> None:
    """Raises a UserError unless a folder is free or was begun with the same settings."""
    begun_to_write = f".{JOB_FILE}.tmp"  # left by a process that was killed within its first write
    if not out.exists() or (out.is_dir() and all(file.name == begun_to_write for file in out.iterdir())):
        return
    if not (out / JOB_FILE).is_file():
        raise UserError(f"{out}: already exists and is no job of make_data; give a new folder.")
    begun = read_json_object(out / JOB_FILE).get("settings")
    if not isinstance(begun, dict):
        raise UserError(f"{out / JOB_FILE}: must hold 'settings', found another file of that name; give a new folder.")
    differing_keys = [key for key in sorted(begun.keys() | job.keys()) if begun.get(key) != job.get(key)]
    if differing_keys:
        changes = "; ".join(f"{key}: {begun.get(key)!r} then, {job.get(key)!r} now" for key in differing_keys)
        raise UserError(f"{out}: was begun with other settings ({changes}); give them again, or a new folder.")


class Progress:
    """Finished questions of a job, by record; any thread may add one."""

    def __init__(self, out: pathlib.Path, job: dict[str, Any]):
        check_job(out, job)
        out.mkdir(parents=True, exist_ok=True)
        if not (out / JOB_FILE).exists():
            write_json(out / JOB_FILE, {"settings": job, "begun": now_text()})
        self.settings = job
        self.begun = read_json_object(out / JOB_FILE).get("begun")
        file = out / PROGRESS_FILE
        self.finished: dict[int, Finished] = {}
        self.totals = dict.fromkeys(TOTALS, 0)
        for finished in _read_finished(file):
            self._take(finished)
        self._file, self._lock, self._flushed = file.open("ab"), threading.Lock(), 0.0

    def add(self, finished: Finished) -> None:
        finished.date = now_text()
        line = json.dumps(dataclasses.asdict(finished), ensure_ascii=True).encode() + b"\n"
        with self._lock:
            self._take(finished)
            self._file.write(line)
            self._file.flush()
            if time.monotonic() - self._flushed > _FLUSH_EVERY:
                os.fsync(self._file.fileno())
                self._flushed = time.monotonic()

    def _take(self, finished: Finished) -> None:
        self.finished[finished.record] = finished
        for name in TOTALS:
            self.totals[name] += getattr(finished, name)

    def close(self) -> None:
        with self._lock, contextlib.closing(self._file):
            self._file.flush()
            os.fsync(self._file.fileno())


def _read_finished(file: pathlib.Path) -> Iterator[Finished]:
    """Yields what is finished, and cuts off a line that was half written when its process was killed.

    Raises:
      UserError: any other line is damaged.
    """
    content = file.read_bytes() if file.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            value = json.loads(line)
            outcomes = [Outcome(**outcome) for outcome in value.pop("outcomes")]
            yield Finished(outcomes=outcomes, **value)
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(f"{file}:{number}: is not a finished question; delete that line to ask it again.") from e


def now_text() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
