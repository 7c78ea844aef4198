"""Files of a source: local files, objects in a bucket, or files of a data set on the Hugging Face hub."""

import contextlib
import dataclasses
import glob
import io
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import fsspec.core

from solar_jax.data.kinds import ABOUT, COMPRESSED, RECORDS, REFUSED, TEXT
from solar_jax.errors import UserError
from solar_jax.storage.paths import is_local
from solar_jax.storage.retry import retry

_PACKAGES = {"gs": "gcsfs, which comes with the extra `gcs`", "s3": "s3fs, which comes with the extra `s3`"}
_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|dev|eval)(?=[/_.-])")
_AT_A_TIME = 1 << 20  # bytes per read from a bucket


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a source, local or remote."""

    name: str  # as used in messages and document ids

    @property
    def suffixes(self) -> list[str]:
        """Suffixes of the name in lower case, last first."""
        return [s.lower() for s in reversed(pathlib.PurePosixPath(self.name).suffixes)]

    @property
    def ending(self) -> str:
        """The suffix that tells what the file holds: the last, or the one before .gz or .zst; "" if none."""
        last, before = [*self.suffixes, "", ""][:2]
        return before if last in COMPRESSED else last

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Opens the file for reading, with `seek`."""
        if not is_local(self.name):
            with io.BufferedReader(_Object(self.name), _AT_A_TIME) as f:
                yield f
        else:
            with pathlib.Path(self.name).open("rb") as f:
                yield f

    @contextlib.contextmanager
    def local(self) -> Iterator[str]:
        """Yields a local path for readers that need one; a temporary copy if the file is remote."""
        if is_local(self.name):
            yield self.name
            return
        with tempfile.NamedTemporaryFile(prefix="solar_jax_", suffix=self.suffixes[0]) as copy:
            with self.open() as f:
                shutil.copyfileobj(f, copy, 1 << 24)
            copy.flush()
            yield copy.name


@dataclasses.dataclass(frozen=True)
class Found:
    """Files of a source, in the order in which they are read, and what lies beside them."""

    files: list[File]
    left_out: list[str]  # names within the folder
    guessed: bool = False  # read as plain text, although their names do not say that they are


def find_files(path: str, plain: bool = False) -> Found:
    """Lists the files of a local or remote file, folder or pattern by name; hidden files only if the path names them.

    A folder is read as one kind of file, the first of `RECORDS` that it has, or else as plain text. In a folder written
    by Hugging Face's `datasets`, only its data files count.

    Args:
      path: the source.
      plain: take every file as plain text.

    Raises:
      UserError: there are no files, or a folder holds several splits of a data set and the path does not name one.
    """
    names, is_folder = _local(path) if is_local(path) else _remote(path)
    if not names:
        raise UserError(
            f"config.data.sources: {path}: must hold files of text, found an empty folder."
            if is_folder
            else f"config.data.sources: {path}: no such file, folder or pattern."
        )
    if not is_folder or plain:
        known = {*TEXT, *REFUSED, *(ending for kind in RECORDS for ending in kind)}
        files = [File(name) for name in names]
        return Found(files, [], not plain and any(file.ending not in known for file in files))
    return _of_folder(path, names)


def _local(path: str) -> tuple[list[str], bool]:
    root = pathlib.Path(path).expanduser()
    if root.is_dir():
        saved = _saved_by_datasets(root)
        files = saved or [p for p in root.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(root))]
        return [str(p) for p in (saved or sorted(files))], True
    if root.is_file():
        return [str(root)], False
    return sorted(p for p in glob.glob(str(root), recursive=True) if pathlib.Path(p).is_file()), False


def _is_hidden(path: pathlib.PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _saved_by_datasets(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the files of a data set written by `save_to_disk`, in its order; empty if the folder is not one."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json", "splits")
        if len(splits) != 1:
            raise UserError(
                f"config.data.sources: {folder}: holds the splits {', '.join(splits)}; name one, as in "
                f"{folder / (splits[0] if splits else 'train')}."
            )
        folder = folder / splits[0]
    if not (folder / "state.json").is_file():
        return []
    files = [folder / entry["filename"] for entry in _json(folder / "state.json", "_data_files")]
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder / 'state.json'}: lists {file.name}, which is missing.")
    return files


def _json(file: pathlib.Path, key: str) -> list[Any]:
    try:
        return list(json.loads(file.read_bytes())[key])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: must be JSON with the key {key!r} ({type(e).__name__}: {e}).") from e


def _remote(url: str) -> tuple[list[str], bool]:
    files, path = file_system(url)

    def listed() -> tuple[list[str], bool]:
        try:
            if glob.has_magic(path):
                named = "/." in path  # as in a local pattern, which finds hidden files only then
                return [p for p in files.glob(path) if files.isfile(p) and (named or "/." not in p)], False
            if files.isfile(path):
                return [path], False
            root = path.rstrip("/")
            found = [p for p in files.find(path) if not _is_hidden(pathlib.PurePosixPath(p.removeprefix(root)))]
            return found, files.isdir(path)
        except FileNotFoundError:
            return [], False

    names, is_folder = retry(listed, url)
    return [files.unstrip_protocol(name) for name in sorted(names)], is_folder


def file_system(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system for a URL, and the path within it.

    Raises:
      UserError: the protocol is unknown, or its package is missing.
    """
    kind = url.split("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as e:
        raise UserError(f"{url}: {kind}:// needs the package {_PACKAGES.get(kind, 'that fsspec names')}: {e}.") from e
    except ValueError as e:
        raise UserError(f"{url}: {kind}:// is not a supported protocol.") from e


def _of_folder(path: str, names: list[str]) -> Found:
    """Selects the files of a folder that hold its text."""
    begin = 1 + len(str(pathlib.Path(path).expanduser()) if is_local(path) else path.rstrip("/"))
    files = [File(name) for name in names]
    guessed = False
    for kind in RECORDS:
        if chosen := [file for file in files if file.ending in kind]:
            break
    else:
        texts = [file for file in files if file.ending in TEXT]
        chosen = texts or [file for file in files if file.ending not in REFUSED]
        if not chosen:
            raise UserError(f"config.data.sources: {files[0].name}: {REFUSED[files[0].ending]}.")
        chosen, guessed = [file for file in chosen if _stem(file) not in ABOUT] or chosen, not texts
    splits = sorted({m[1] for file in chosen if (m := _SPLIT.search(file.name[begin:]))})
    if len(splits) > 1:
        raise UserError(
            f"config.data.sources: {path}: holds the splits {', '.join(splits)}; name one by a pattern, as in "
            f"{path.rstrip('/')}/**/*{'train' if 'train' in splits else splits[0]}*."
        )
    taken = {file.name for file in chosen}
    return Found(chosen, [name[begin:] for name in names if name not in taken], guessed)


def _stem(file: File) -> str:
    return pathlib.PurePosixPath(file.name).name.split(".")[0].lower()


class _Object(io.RawIOBase):
    """A remote file that is reopened at the same offset when a read fails."""

    def __init__(self, url: str):
        super().__init__()
        self._url, self._at, self._file = url, 0, None
        self._files, self._path = file_system(url)
        self._size = retry(lambda: self._files.size(self._path), url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = retry(lambda: self._read(len(buffer)), self._url)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        if self._at >= self._size:
            return b""
        with contextlib.ExitStack() as failed:
            failed.callback(self.close_file)  # the next try reopens it
            if self._file is None:
                self._file = self._files.open(self._path, "rb")
            if self._file.tell() != self._at:
                self._file.seek(self._at)
            data = self._file.read(size)
            if not data:
                raise OSError(f"the object ends after {self._at} of {self._size} bytes")
            failed.pop_all()
        return data

    def close_file(self) -> None:
        broken, self._file = self._file, None
        if broken is not None:
            with contextlib.suppress(Exception):
                broken.close()

    def close(self) -> None:
        self.close_file()
        super().close()
