"""Paths on this machine or behind a URL (gs://, s3://, hf://), and atomic reads and writes of small files."""

import logging
import os
import pathlib
import typing
from collections.abc import Callable
from typing import Any

import fsspec
from etils import epath

from solar_jax.errors import UserError
from solar_jax.storage.retry import retry

_MOST_SMALL_BYTES = 1 << 28  # largest tokenizer, template or JSON file

# TensorStore and other hosts create and delete objects too, so listings must not be cached.
for _protocol in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)
# gcsfs logs a page and a traceback for every request that fails for good; we retry or report those in one sentence.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def is_local(place: str | os.PathLike[str]) -> bool:
    """Returns whether a path is on a file system of this machine; etils' paths keep a bucket's URL."""
    return "://" not in os.fspath(place)


def path(text: str) -> pathlib.Path:
    """Returns a local path, or a bucket path with the same interface."""
    return pathlib.Path(text).expanduser() if is_local(text) else typing.cast(pathlib.Path, epath.Path(text))


def write_file(file: pathlib.Path, content: bytes | str) -> None:
    """Replaces a file atomically: a reader sees the old content or the new, never a part.

    Raises:
      OSError: a local file cannot be written.
      UserError: the bucket rejects the write.
    """
    if isinstance(content, str):
        content = content.encode()
    temporary = file.with_name(f".{file.name}.tmp") if is_local(file) else file  # an object appears once complete
    attempt(file, lambda: temporary.write_bytes(content))
    if temporary != file:
        os.replace(temporary, file)


def read_text(file: pathlib.Path) -> str | None:
    """Returns the text of a file, or None if there is no such file.

    Raises:
      OSError: a local file cannot be read.
      UserError: the bucket fails to return it.
    """
    return attempt(file, lambda: file.read_text() if file.exists() else None)


def attempt(place: pathlib.Path, action: Callable[[], Any]) -> Any:
    """Runs an action on a path and returns its result: once on a local path, with retries in a bucket.

    Raises:
      UserError: the bucket keeps failing.
    """
    return action() if is_local(place) else retry(action, str(place))


def byte_size(file: pathlib.Path) -> int:
    """Returns the size of a local file or an object in a bucket."""
    found: Any = file.stat()
    return found.st_size if is_local(file) else found.length


def read_small(file: pathlib.Path) -> bytes:
    """Returns the content of a file that does not hold weights."""
    size = byte_size(file)
    if size > _MOST_SMALL_BYTES:
        raise UserError(f"{file}: is too large ({size} bytes) for anything but weights.")
    return file.read_bytes()
