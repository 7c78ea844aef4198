"""One owner per folder: on this machine a lock that ends with its process, in a bucket a lease with a heartbeat."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from solar_jax.errors import UserError
from solar_jax.storage.paths import is_local

OWNER = ".owner.json"
HEARTBEAT = 30.0  # seconds between two signs of life in a bucket
STALE = 300.0  # seconds without one after which a lease may be taken over


def this_process() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": now}


def described(text: str, moved: float | None) -> str:
    """Describes an owner from its record, and when it last wrote anything (seconds since 1970)."""
    try:
        record = json.loads(text)
        said = f"process {record['process']} on {record['host']}"
        said += f", since {record['since']}" if "since" in record else ""
    except (ValueError, KeyError, TypeError):
        said = "another process"
    if moved is None:
        return said
    ago = max(0.0, datetime.datetime.now(datetime.UTC).timestamp() - moved)
    return f"{said}, which last moved {ago:.0f} s ago"


@contextlib.contextmanager
def owned(folder: pathlib.Path, *, take_over: bool = False) -> Iterator[None]:
    """Makes this process the only one that writes to a folder.

    Args:
      folder: local or in a bucket; it need not exist.
      take_over: take the lease of a process that has given no sign of life for `STALE` seconds; of buckets only, since
        a lock on this machine ends with its process.

    Raises:
      UserError: another process owns the folder.
    """
    with _locked(folder) if is_local(folder) else _leased(folder, take_over):
        yield


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    folder = folder.absolute()
    file = folder.with_name(f".{folder.name}.owner")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(folder, file)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written: {e.strerror}.") from e
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(folder: pathlib.Path, file: pathlib.Path) -> int:
    """Returns the descriptor of the lock file, locked until it is closed."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(descriptor)
            by = holder(file, folder)
            raise UserError(
                f"{folder}: is in use by {by}; wait for it to end, or end it, before starting another."
            ) from e
        with contextlib.suppress(FileNotFoundError):  # the previous owner may have removed the file in the meantime
            if os.stat(file).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)


def holder(locked: pathlib.Path, folder: pathlib.Path) -> str:
    """Describes the process that has a lock, as Linux knows it, and when it last wrote to its folder."""
    inode, found = os.stat(locked).st_ino, {}
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # "1: FLOCK ADVISORY WRITE PROCESS DEVICE:DEVICE:INODE 0 EOF"
            if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
                found = {"host": socket.gethostname(), "process": int(fields[4])}
    return described(json.dumps(found), last_moved(folder))


def last_moved(folder: pathlib.Path) -> float | None:
    """Returns when the newest file directly in a folder was written, in seconds since 1970."""
    with contextlib.suppress(OSError):
        return max((entry.stat().st_mtime for entry in folder.iterdir() if entry.is_file()), default=None)
    return None


@contextlib.contextmanager
def _leased(folder: pathlib.Path, take_over: bool) -> Iterator[None]:
    lease = _Lease(folder)
    lease.take(take_over)
    ended = threading.Event()
    thread = threading.Thread(target=lease.keep, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        lease.give_back()


class _Lease:
    """An object that is only ever replaced by the process that knows its generation."""

    def __init__(self, folder: pathlib.Path):
        import tensorstore as ts  # imported here: slow, and only buckets need it

        scheme, _, rest = str(folder).partition("://")
        bucket, _, path = rest.partition("/")
        driver = {"gs": "gcs", "s3": "s3"}[scheme]
        self._folder, self._me = folder, this_process()
        self._store = ts.KvStore.open({"driver": driver, "bucket": bucket, "path": f"{path.rstrip('/')}/"}).result()
        self._generation = b""

    def take(self, take_over: bool) -> None:
        found = self._read()
        if found.state == "value":
            moved = _beat(found.value)
            silent = datetime.datetime.now(datetime.UTC).timestamp() - moved
            owner = described(found.value.decode(errors="replace"), moved)
            if silent < STALE:
                raise UserError(
                    f"{self._folder}: is in use by {owner}; wait for it to end, or end it, before the next start."
                )
            if not take_over:
                raise UserError(
                    f"{self._folder}: belongs to {owner}, and has seen no sign of life since; if that process is gone, "
                    "--take_over starts in its place."
                )
        if not self._write(found.stamp.generation):
            raise UserError(f"{self._folder}: another process has just started there.")

    def keep(self, ended: threading.Event) -> None:
        """Renews the lease until the event is set; ends this process if somebody has taken the lease over."""
        while not ended.wait(HEARTBEAT):
            try:
                if self._write(self._generation):
                    continue
                found = self._read()
            except Exception:  # an unreachable bucket stops the run by itself, if it stays away
                continue
            if found.state == "value" and _same(found.value, self._me):  # written, but the answer was lost
                self._generation = found.stamp.generation
                continue
            owner = described(found.value.decode(errors="replace"), None) if found.state == "value" else "nobody"
            sys.stderr.write(f"error: {self._folder}: was taken over by {owner}; this process ends without writing.\n")
            sys.stderr.flush()
            os._exit(2)  # at once: whatever it still wrote would disturb the new owner

    def give_back(self) -> None:
        with contextlib.suppress(Exception):  # it becomes stale by itself
            self._store.write(OWNER, None, if_equal=self._generation).result()

    def _read(self) -> Any:
        try:
            return self._store.read(OWNER).result()
        except ValueError as e:
            raise UserError(f"{self._folder}: the bucket could not be reached: {str(e).splitlines()[0]}") from e

    def _write(self, expected: bytes) -> bool:
        now = datetime.datetime.now(datetime.UTC).timestamp()
        content = json.dumps(self._me | {"beat": now}).encode()
        stamp = self._store.write(OWNER, content, if_equal=expected).result()
        if stamp.generation:
            self._generation = stamp.generation
        return bool(stamp.generation)


def _beat(content: bytes) -> float:
    try:
        return float(json.loads(content)["beat"])
    except (ValueError, KeyError, TypeError):
        return 0.0


def _same(content: bytes, me: dict[str, Any]) -> bool:
    try:
        return {key: json.loads(content).get(key) for key in me} == me
    except (ValueError, AttributeError):
        return False
