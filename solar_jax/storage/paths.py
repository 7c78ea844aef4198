"""Where files are: on this machine, or behind a URL (gs://, s3://, hf://); small ones read and written whole."""

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

_MOST_SMALL_BYTES = 1 << 28  # of a tokenizer, a template, or JSON

# Objects come and go by other hands, TensorStore's and other hosts', so no listing may be remembered.
for _protocol in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)
# It logs a page and a traceback each time that a request fails for good, which we ask again or tell in a sentence.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def is_local(place: str | os.PathLike[str]) -> bool:
    """Whether a path is of this machine's file systems; etils' paths keep the URL of a bucket's."""
    return "://" not in os.fspath(place)


def path(text: str) -> pathlib.Path:
    """A local path, or a bucket's behind the same interface."""
    return pathlib.Path(text).expanduser() if is_local(text) else typing.cast(pathlib.Path, epath.Path(text))


def write_file(file: pathlib.Path, content: bytes | str) -> None:
    """Replaces a file at once: a reader sees the old content or the new, never a part.

    Raises:
      OSError: it cannot be written here.
      UserError: the bucket does not take it.
    """
    if isinstance(content, str):
        content = content.encode()
    temporary = file.with_name(f".{file.name}.tmp") if is_local(file) else file  # an object appears when it is whole
    attempt(file, lambda: temporary.write_bytes(content))
    if temporary != file:
        os.replace(temporary, file)


def read_text(file: pathlib.Path) -> str | None:
    """The text of a file; None where there is none.

    Raises:
      OSError: it cannot be read here.
      UserError: the bucket does not give it.
    """
    return attempt(file, lambda: file.read_text() if file.exists() else None)


def attempt(place: pathlib.Path, action: Callable[[], Any]) -> Any:
    """What an action on a place returns: here it is done once, in a bucket again when it fails.

    Raises:
      UserError: the bucket fails.
    """
    return action() if is_local(place) else retry(action, str(place))


def byte_size(file: pathlib.Path) -> int:
    """Of a local file or an object in a bucket."""
    found: Any = file.stat()
    return found.st_size if is_local(file) else found.length


def read_small(file: pathlib.Path) -> bytes:
    """The content of a file that is no weights."""
    size = byte_size(file)
    if size > _MOST_SMALL_BYTES:
        raise UserError(f"{file}: is too large ({size} bytes) for anything but weights.")
    return file.read_bytes()
