"""Checkpoint folders in a bucket: filled object by object through a local folder, config.json last.

Buckets have no rename, so the folder is a checkpoint only once it has config.json; until then a `.job.json` describes
what is being written, and the same job resumes where it stopped.
"""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from solar_jax.errors import UserError
from solar_jax.storage.atomic_folder import CONFIGS, JOB
from solar_jax.storage.owner import OWNER, owned
from solar_jax.storage.retry import retry


def names(folder: pathlib.Path) -> set[str]:
    """Returns the names of the objects directly in a bucket folder."""
    return retry(lambda: {p.name for p in folder.iterdir()} - {OWNER} if folder.exists() else set(), str(folder))


def check_bucket(folder: pathlib.Path, overwrite: bool) -> None:
    """Raises a UserError unless a bucket folder is empty, unfinished, or may be replaced."""
    found = names(folder)
    if not found or (JOB in found and not _is_checkpoint(folder)):
        return
    if not overwrite:
        raise UserError(f"{folder}: already exists; give a new folder, or --overwrite to replace it.")
    if not _is_checkpoint(folder):
        raise UserError(f"{folder}: is not a checkpoint, so it is not replaced; give a new folder.")


def _is_checkpoint(folder: pathlib.Path) -> bool:
    return any(retry((folder / name).exists, str(folder / name)) for name in CONFIGS)


@contextlib.contextmanager
def bucket_folder(
    folder: pathlib.Path, *, overwrite: bool, job: dict[str, Any], first: bool = True
) -> Iterator[tuple[pathlib.Path, Callable[[str], bool], Callable[[pathlib.Path, str], None]]]:
    """Yields a local folder to fill, a test for objects already in the bucket, and a function that uploads a file.

    Files left in the local folder at the end of the block are uploaded too, config.json last.

    Args:
      folder: in the bucket.
      overwrite: replace an existing checkpoint.
      job: JSON that describes the folder's content.
      first: whether this process prepares and completes the folder, if several fill it.
    """
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(owned(folder))
            check_bucket(folder, overwrite)
            _prepare(folder, json.dumps(job, indent=2, sort_keys=True))

        def has(name: str) -> bool:
            return retry((folder / name).exists, f"{folder / name}")

        def put(file: pathlib.Path, name: str) -> None:
            retry(lambda: _upload(file, folder / name), f"{folder / name}")
            file.unlink()

        local = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="solar_jax_upload_")))
        yield local, has, put
        files = [p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()]
        for name in sorted(files, key=lambda name: name in CONFIGS):
            put(local / name, name)
        if first:
            retry((folder / JOB).unlink, f"{folder / JOB}")


def _prepare(folder: pathlib.Path, job: str) -> None:
    """Keeps what the same job wrote earlier and deletes everything else, config.json first."""
    found = names(folder)
    if JOB in found and not _is_checkpoint(folder) and retry((folder / JOB).read_text, f"{folder / JOB}") == job:
        return
    for name in CONFIGS:
        retry(lambda path=folder / name: path.unlink() if path.exists() else None, f"{folder / name}")
    for name in sorted(found - set(CONFIGS)):
        path: Any = folder / name  # bucket paths have rmtree, pathlib's do not
        retry(lambda path=path: path.rmtree() if path.is_dir() else path.unlink(), f"{path}")
    retry(lambda: (folder / JOB).write_text(job), f"{folder / JOB}")  # without mkdir, which might create a bucket


def _upload(file: pathlib.Path, target: pathlib.Path) -> None:
    """Streams a file to an object, which appears once it is complete."""
    with file.open("rb") as source, target.open("wb") as out:
        while block := source.read(1 << 24):
            out.write(block)
