"""One owner per folder: on this machine a lock that ends with its process, in a bucket a lease with a heartbeat.

Leases need writes that depend on an object's generation, which gs:// has; folders in s3:// have no owner.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from solar_jax.errors import UserError
from solar_jax.storage.paths import is_local

OWNER = ".owner.json"
HEARTBEAT = 10.0  # seconds between two signs of life in a bucket
PATIENCE = 5.0  # seconds that the end of a command waits for a bucket
LONGEST = 120.0  # seconds that a request may take, with TensorStore's own tries
STALE = 60.0  # seconds without one after which a lease may be taken over


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
    ago = max(0.0, _now() - moved)
    return f"{said}, which last moved {ago:.0f} s ago"


@contextlib.contextmanager
def owned(folder: pathlib.Path, *, take_over: bool = False) -> Iterator[None]:
    """Makes this process the only one that writes to a folder.

    Args:
      folder: local or in a bucket; it need not exist.
      take_over: wait until the owner has given no sign of life for `STALE` seconds, and take its place; of buckets
        only, since a lock on this machine ends with its process.

    Raises:
      UserError: another process owns the folder.
    """
    if is_local(folder):
        holding: contextlib.AbstractContextManager[None] = _locked(folder)
    elif str(folder).startswith("gs://"):
        holding = _leased(folder, take_over)
    else:
        holding = contextlib.nullcontext()
    with holding:
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
        thread.join(PATIENCE)  # it may be waiting for a bucket that stays away
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
        if found.state == "value" and not _has_ended(found.value, self._me):
            moved = _beat(found.value)
            owner = described(found.value.decode(errors="replace"), moved)
            if not take_over:
                raise UserError(
                    f"{self._folder}: is in use by {owner}; wait for it to end, or end it. If it is gone already, "
                    f"--take_over starts in its place once it has not moved for {STALE:.0f} s."
                )
            found = self._silent(found, owner)
        if not self._write(found.stamp.generation):
            raise UserError(f"{self._folder}: another process has just started there.")

    def _silent(self, found: Any, owner: str) -> Any:
        """Waits until a lease has not been renewed for `STALE` seconds.

        Raises:
          UserError: it was renewed.
        """
        until = time.monotonic() + max(0.0, STALE - (_now() - _beat(found.value)))
        while (left := until - time.monotonic()) > 0:
            sys.stderr.write(f"{self._folder}: waiting {left:.0f} s for a sign of life of {owner}\n")
            time.sleep(min(left, HEARTBEAT))
        again = self._read()
        if again.state == "value" and again.stamp.generation != found.stamp.generation:
            raise UserError(f"{self._folder}: is in use by {owner}; it lives, so it is not taken over.")
        return again

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
            if ended.is_set():  # given back while this renewal waited for the bucket
                return
            owner = described(found.value.decode(errors="replace"), None) if found.state == "value" else "nobody"
            sys.stderr.write(f"error: {self._folder}: was taken over by {owner}; this process ends without writing.\n")
            sys.stderr.flush()
            os._exit(2)  # at once: whatever it still wrote would disturb the new owner

    def give_back(self) -> None:
        with contextlib.suppress(Exception):  # it becomes stale by itself
            self._store.write(OWNER, None, if_equal=self._generation).result(timeout=PATIENCE)

    def _read(self) -> Any:
        try:
            return self._store.read(OWNER).result(timeout=LONGEST)
        except (ValueError, TimeoutError) as e:
            reason = (str(e).splitlines() or ["no answer"])[0]
            raise UserError(f"{self._folder}: the bucket could not be reached: {reason}") from e

    def _write(self, expected: bytes) -> bool:
        content = json.dumps(self._me | {"beat": _now()}).encode()
        stamp = self._store.write(OWNER, content, if_equal=expected).result(timeout=LONGEST)
        if stamp.generation:
            self._generation = stamp.generation
        return bool(stamp.generation)


def _now() -> float:
    return datetime.datetime.now(datetime.UTC).timestamp()


def _has_ended(content: bytes, me: dict[str, Any]) -> bool:
    """Returns whether the owner was a process of this machine that is gone, or this process itself."""
    try:
        record = json.loads(content)
        process = int(record["process"])
    except (ValueError, KeyError, TypeError):
        return False
    if record.get("host") != me["host"]:
        return False
    return process == me["process"] or not pathlib.Path(f"/proc/{process}").exists()


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
