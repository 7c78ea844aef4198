"""Where files are: on this machine, or behind a URL (gs://, s3://, hf://)."""

import os
import pathlib
import typing

from etils import epath


def is_local(place: str | os.PathLike[str]) -> bool:
    """Whether a path is of this machine's file systems; etils' paths keep the URL of a bucket's."""
    return "://" not in os.fspath(place)


def path(text: str) -> pathlib.Path:
    """A local path, or a bucket's behind the same interface."""
    return pathlib.Path(text).expanduser() if is_local(text) else typing.cast(pathlib.Path, epath.Path(text))
