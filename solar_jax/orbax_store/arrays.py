"""Reads and writes the arrays of an Orbax checkpoint in blocks, through TensorStore, where Orbax keeps them.

Orbax itself moves full arrays; a stacked leaf of a large model exceeds the memory of the machine that converts it.
"""

import collections
import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from solar_jax.errors import UserError, phrase

_METADATA, _CHUNK = "/zarr.json", "/c/"  # parts of a store's keys
_DRIVERS = {"gs": "gcs", "s3": "s3"}
_CACHE_BYTES = 1 << 27
_PENDING_BYTES = 1 << 28  # queued for writing and not yet on disk
DATA_FILE_BYTES = 1 << 27  # OCDBT keeps the last file in memory until it is full
Index = tuple[slice | int, ...]


def _key_value_store(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the spec of the store that Orbax keeps in a checkpointable's folder."""
    # No URLs: there, a per cent sign or a question mark in a folder's name has another meaning.
    scheme, _, place = os.fspath(folder).rpartition("://")
    if scheme:
        bucket, _, path = place.partition("/")
        base = {"driver": _DRIVERS[scheme], "bucket": bucket, "path": f"{path.rstrip('/')}/"}
        if scheme == "s3":
            base |= _s3_from_environment()
    else:
        base = {"driver": "file", "path": f"{pathlib.Path(folder).resolve()}/"}
    return {"driver": "ocdbt", "base": base, "config": {"max_inline_value_bytes": 1024}}


def _s3_from_environment() -> dict[str, Any]:
    """Reads what s3fs takes from the environment but TensorStore needs as options: another vendor's address, keys."""
    e, found = os.environ, {}
    if endpoint := e.get("AWS_ENDPOINT_URL_S3") or e.get("AWS_ENDPOINT_URL"):
        found["endpoint"] = endpoint
        found["aws_region"] = e.get("AWS_REGION") or e.get("AWS_DEFAULT_REGION") or "us-east-1"
    if "AWS_ACCESS_KEY_ID" in e:
        found["aws_credentials"] = {"type": "environment"}
    return found


def _array(folder: pathlib.Path, path: str) -> dict[str, Any]:
    """Returns the spec of one array; Orbax joins the keys of its path with dots."""
    return {"driver": "zarr3", "kvstore": _key_value_store(folder) | {"path": path.replace("/", ".") + "/"}}


def _keys(folder: pathlib.Path) -> list[str]:
    return [k.decode() for k in ts.KvStore.open(_key_value_store(folder)).result().list().result()]


def layout_is_known(folder: pathlib.Path) -> bool:
    """Returns whether a checkpointable has the layout that this module reads: zarr v3 in OCDBT, Orbax's default."""
    if not (folder / "manifest.ocdbt").exists():
        return False
    try:
        return not any(key.endswith("/.zarray") for key in _keys(folder))
    except (ValueError, OSError):
        return True  # known and damaged


def array_paths(folder: pathlib.Path) -> list[str]:
    """Returns the path of every array of a checkpointable, e.g. "layers/q_proj".

    Raises:
      ValueError: the checkpointable is damaged.
    """
    return [k.removesuffix(_METADATA).replace(".", "/") for k in _keys(folder) if k.endswith(_METADATA)]


def chunks(folder: pathlib.Path) -> dict[str, set[tuple[int, ...]]]:
    """Returns the grid positions of the stored chunks by array path; each chunk is either complete or absent."""
    found: dict[str, set[tuple[int, ...]]] = collections.defaultdict(set)
    for key in _keys(folder):
        path, _, position = key.partition(_CHUNK)
        if position:
            found[path.replace(".", "/")].add(tuple(map(int, position.split("/"))))
    return found


def open_array(folder: pathlib.Path, path: str, context: ts.Context | None = None) -> Any:
    """Opens an array for reading by slices.

    Without a `context`, chunks are cached for neighbouring slices that share one. A missing chunk fails when it is
    read.

    Raises:
      ValueError: the array does not exist or is damaged.
    """
    context = context or ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    spec = _array(folder, path) | {"fill_missing_data_reads": False}
    return ts.open(spec, read=True, open=True, context=context).result()


@contextlib.contextmanager
def told_errors(folder: pathlib.Path) -> Iterator[None]:
    """Turns a store's failures into errors that can be reported: OSError for a local folder, UserError for a bucket."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as e:  # its type depends on the kind of failure
        if "://" in os.fspath(folder) and re.search(r"(gs|s3)://|http_response_code", str(e)):
            raise UserError(f"{folder}: the bucket failed ({phrase(e)}).") from e
        if found := re.search(r"os_error_code='(\d+)'", str(e)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from e
        raise


class BlockWriter:
    """Writes arrays under a checkpointable's folder with a bounded number of bytes in flight."""

    def __init__(self, folder: pathlib.Path, progress: Callable[[int], None]):
        self._folder, self._progress = folder, progress
        self._context = ts.Context({"data_copy_concurrency": {"limit": 2}, "file_io_concurrency": {"limit": 4}})
        self._pending: collections.deque[tuple[Any, int]] = collections.deque()
        self._pending_bytes = 0

    def create(self, path: str, shape: tuple[int, ...], dtype: np.dtype, chunk: tuple[int, ...], fresh: bool) -> Any:
        """Opens an array for writing in blocks of `chunk`; resumes one that an earlier run began unless `fresh`."""
        spec = _array(self._folder, path)
        spec["kvstore"]["target_data_file_size"] = DATA_FILE_BYTES
        spec["store_data_equal_to_fill_value"] = True  # Orbax treats an absent chunk of zeros as lost
        spec["metadata"] = {
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            # One checksum per chunk: a flipped bit is an error when the chunk is read, by Orbax too.
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        }
        return ts.open(spec, create=True, open=not fresh, delete_existing=fresh, context=self._context).result()

    def write(self, array: Any, index: Index, block: np.ndarray) -> None:
        """Queues a block, which must not change afterwards."""
        while self._pending and (self._pending_bytes + block.nbytes > _PENDING_BYTES or self._pending[0][0].done()):
            self._wait()
        self._pending.append((array[index].write(block, can_reference_source_data_indefinitely=True), block.nbytes))
        self._pending_bytes += block.nbytes

    def skip(self, size: int) -> None:
        """Counts bytes that are already on disk."""
        self._progress(size)

    def flush(self) -> None:
        """Returns when everything is on disk."""
        while self._pending:
            self._wait()

    def abandon(self) -> None:
        """Returns when no write is in flight, failed ones included; the folder may then be removed."""
        while self._pending:
            written, _ = self._pending.popleft()
            with contextlib.suppress(Exception):
                written.result()

    def _wait(self) -> None:
        future, size = self._pending.popleft()
        future.result()
        self._pending_bytes -= size
        self._progress(size)
