"""Atomic folders: filled under a hidden sibling name and renamed at the end, so they appear complete or not at all."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from solar_jax.errors import UserError
from solar_jax.storage.owner import holder

# In a folder that is being filled: describes the result, so that the same job can resume. Hidden, since no companion
# file of a checkpoint is.
JOB = ".job.json"
CONFIGS = ("config.json", "model/config.json")  # a checkpoint has one of them: HF folders the first, ours the second


def check_target(out: pathlib.Path, overwrite: bool = False) -> None:
    """Raises a UserError unless `out` is free: missing, an empty folder, or a checkpoint that may be replaced."""
    try:
        if out.is_symlink() and not out.exists():
            raise UserError(f"{out}: is a dangling symbolic link; give a new folder.")
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        if not overwrite:
            raise UserError(f"{out}: already exists; give a new folder, or --overwrite to replace it.")
        if not out.is_dir() or not any((out / name).exists() for name in CONFIGS):
            raise UserError(f"{out}: is not a checkpoint, so it is not replaced; give a new folder.")
    except OSError as e:  # such as a name that is too long, or a folder without read permission
        raise UserError(f"{out}: cannot be written: {e.strerror}.") from e


def check_space(out: pathlib.Path, needed: int) -> None:
    """Raises a UserError unless the disk that will hold `out` has `needed` bytes of free space."""
    parent = next(p for p in (out, *out.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    # Files that an earlier run left are reused or deleted.
    begun = sum(os.lstat(os.path.join(at, f)).st_blocks * 512 for at, _, files in os.walk(partial(out)) for f in files)
    if needed > free + begun:
        raise UserError(f"{out}: needs {needed / 1e9:.2f} GB of disk, but {parent} has {free / 1e9:.2f} GB free.")


def partial(out: pathlib.Path) -> pathlib.Path:
    """Returns the folder that `out` is filled in before the rename; next to the link's target if `out` is a link."""
    out = out.resolve()
    return out.parent / f".{out.name}.partial"


@contextlib.contextmanager
def new_folder(
    out: pathlib.Path, *, overwrite: bool = False, job: dict[str, Any] | None = None, keep: bool = False
) -> Iterator[pathlib.Path]:
    """Yields a hidden sibling of `out` to fill; it becomes `out` if the block succeeds and is deleted if it fails.

    Leftovers of a killed process are deleted or, if they are from the same `job`, kept to be completed. An interrupted
    job (Ctrl-C) leaves its files in the same way.

    Args:
      out: the folder to create.
      overwrite: replace an existing checkpoint.
      job: JSON that describes the folder's content; the same job resumes where it stopped.
      keep: keep the files for the same job however the block ends.

    Raises:
      UserError: `out` exists, cannot be written, or is being filled by another process.
    """
    check_target(out, overwrite)
    out = out.resolve()  # a change of the working directory must not move it
    folder = partial(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    except OSError as e:
        raise UserError(f"{out}: cannot be written: {e.strerror}.") from e
    try:
        try:
            if not out.exists() and _old(out).exists():  # killed between the two renames of `_replace`
                os.rename(_old(out), out)
            check_target(out, overwrite)  # again, since another process may have held the lock
            _prepare(folder, job)
            yield folder
            (folder / JOB).unlink(missing_ok=True)
            _replace(out, folder)
        except OSError as e:
            if e.errno is None:
                raise
            raise UserError(f"{out}: cannot be written: {e.strerror}.") from e
    except BaseException as e:
        if job is None or not (keep or isinstance(e, KeyboardInterrupt | SystemExit)):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock(folder: pathlib.Path) -> int:
    """Creates `folder` if missing and locks it for this process until the returned descriptor is closed."""
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(descriptor)
            raise UserError(f"{folder}: is being written by {holder(folder, folder)}; wait for it to end.") from e
        # The previous holder may have renamed or removed the folder in the meantime.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(folder).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)


def _prepare(folder: pathlib.Path, job: dict[str, Any] | None) -> None:
    """Keeps what the same job wrote earlier and deletes everything else."""
    text = None if job is None else json.dumps(job, indent=2, sort_keys=True)
    if text is not None and (folder / JOB).is_file() and (folder / JOB).read_text(errors="replace") == text:
        return
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if text is not None:
        (folder / JOB).write_text(text)


def _old(out: pathlib.Path) -> pathlib.Path:
    return out.parent / f".{out.name}.old"


def _replace(out: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames `folder` to `out`; an old `out` is moved aside first and deleted only after the rename."""
    if not out.exists() or not any(out.iterdir()):
        if out.exists():
            out.rmdir()
        os.rename(folder, out)
        return
    old = _old(out)
    shutil.rmtree(old, ignore_errors=True)
    os.rename(out, old)
    os.rename(folder, out)
    shutil.rmtree(old)
