"""Safetensors reader and writer: tensors as byte ranges of a file, and files written from byte ranges or arrays.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}} and the data. The format is
simple enough to handle ourselves, which keeps bfloat16 exact, checks every range, and lets the kernel copy unchanged
bytes from file to file without passing them through this process.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from solar_jax.errors import UserError
from solar_jax.storage.paths import byte_size, is_local

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
_MOST_AXES, _MOST_ELEMENTS, MOST_NAME = 64, 1 << 63, 1000  # bounds on products and message lengths
_COPY_BYTES = 1 << 26  # per kernel copy, i.e. between two progress reports


@dataclasses.dataclass(frozen=True)
class Entry:
    """Location of one tensor: a byte range of a file."""

    file: pathlib.Path
    code: str  # dtype name as in the file
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    stop: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor to write: a byte range of an existing file, or blocks along its first axis in order."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    content: Entry | Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: pathlib.Path) -> dict[str, Entry]:
    """Reads every tensor's entry, with ranges checked against the file size and against each other.

    Raises:
      UserError: the file is not safetensors, is cut short, or its header contradicts itself.
    """
    try:
        size = byte_size(file)
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise UserError(
                    f"{file}: a header of {length} bytes does not fit a file of {size} bytes; is it cut short?"
                )
            header = json.loads(f.read(length), object_pairs_hook=_unique)
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: the header is not JSON: {e}.") from e
    if not isinstance(header, dict):
        raise UserError(f"{file}: the header must be a JSON object, found {type(header).__name__}.")
    entries = {
        name: _entry(file, name, info, 8 + length, size) for name, info in header.items() if name != "__metadata__"
    }
    check_disjoint(entries)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object hook that rejects duplicate keys."""
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise ValueError(f"{short(name)} appears twice")
        out[name] = value
    return out


def short(value: Any) -> str:
    """Formats any value from a file as one line of a message, at most 200 characters."""
    try:
        text = repr(value)
    except RecursionError:
        text = "a value nested too deeply"
    return text if len(text) <= 200 else text[:197] + "..."


def _entry(file: pathlib.Path, name: str, info: Any, data: int, size: int) -> Entry:
    """Validates one tensor's header entry; the file has `size` bytes and its data section starts at byte `data`."""
    if not name.isprintable() or len(name) > MOST_NAME:
        raise UserError(f"{file}: a tensor's name must be printable and short, found {short(name)}.")
    try:
        code, shape, (start, stop) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        sound = re.fullmatch(r"\w{1,20}", code, re.ASCII) and len(shape) <= _MOST_AXES
        if not sound or not all(type(n) is int and 0 <= n < _MOST_ELEMENTS for n in shape):
            raise ValueError
        if not all(type(n) is int and n >= 0 for n in (start, stop)):
            raise ValueError
    except (TypeError, KeyError, ValueError) as e:
        raise UserError(f"{file}: the header entry for {name} is malformed: {short(info)}.") from e
    start, stop = data + start, data + stop
    if not start <= stop <= size:
        raise UserError(
            f"{file}: {name} should occupy bytes {start}..{stop}, but the file ends at {size}; is it cut short?"
        )
    if code in DTYPES and math.prod(shape) * DTYPES[code].itemsize != stop - start:
        raise UserError(f"{file}: {name} has {stop - start} bytes, which does not match {code} {shape}.")
    return Entry(file, code, shape, start, stop)


def check_disjoint(entries: dict[str, Entry]) -> None:
    """Raises a UserError if two tensors of a file share bytes, which no valid writer produces."""
    ordered = sorted((e.start, e.stop, name) for name, e in entries.items() if e.start < e.stop)
    for (_, stop, name), (start, _, following) in itertools.pairwise(ordered):
        if start < stop:
            raise UserError(f"{entries[name].file}: {name} and {following} share bytes {start}..{stop}.")


def read_tensor(name: str, entry: Entry, rows: slice = slice(None)) -> np.ndarray:
    """Reads the tensor, or rows of its first axis, and no other bytes.

    Raises:
      UserError: the dtype is not float32, bfloat16 or float16, or the file has been truncated.
    """
    if entry.code not in DTYPES:
        raise UserError(f"{entry.file}: {name} must be one of {', '.join(DTYPES)}, found {entry.code}.")
    start, stop, shape = entry.start, entry.stop, entry.shape
    if rows != slice(None):
        first, last, _ = rows.indices(shape[0])
        width = (stop - start) // shape[0]
        start, stop, shape = start + first * width, start + last * width, (last - first, *shape[1:])
    out = np.empty(shape, DTYPES[entry.code])
    buffer = memoryview(out.reshape(-1).view(np.uint8))
    try:
        # Unbuffered for local files: bytes are copied straight from the page cache into the array.
        with open(entry.file, "rb", buffering=0) if is_local(entry.file) else entry.file.open("rb") as f:
            f.seek(start)
            done = 0
            while done < len(buffer):
                n = f.readinto(buffer[done:])  # type: ignore[attr-defined]
                if not n:
                    raise UserError(f"{entry.file}: ends before byte {stop} of {name}; was it modified meanwhile?")
                done += n
    except OSError as e:
        raise UserError(f"{entry.file}: {name} cannot be read: {e.strerror}.") from e
    return out


def write_safetensors(
    file: pathlib.Path, pieces: Sequence[Piece], progress: Callable[[int], None] = lambda n: None
) -> None:
    """Writes tensors in order, one block in memory at a time; the file is fsynced before this returns.

    Args:
      file: the target, overwritten if it exists.
      pieces: the tensors to write.
      progress: called with the bytes written since the last call.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        stop = offset + piece.nbytes
        header[piece.name] = {
            "dtype": CODES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    blob = json.dumps(header, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    with open(file, "wb", buffering=0) as out:
        _write_all(out, len(blob).to_bytes(8, "little") + blob)
        for piece in pieces:
            if isinstance(piece.content, Entry):
                _copy(piece.content, out, progress)
                continue
            written = 0
            for block in piece.content():
                data = np.ascontiguousarray(block, piece.dtype).reshape(-1).view(np.uint8)
                _write_all(out, data.data)
                written += data.size
                progress(data.size)
            if written != piece.nbytes:
                raise ValueError(f"{piece.name} has {written} bytes, the header says {piece.nbytes}.")
        os.fsync(out.fileno())


def _write_all(out: BinaryIO, data: Any) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]


def _copy(entry: Entry, out: BinaryIO, progress: Callable[[int], None]) -> None:
    """Appends a byte range of another file through a kernel copy, which shares blocks where it can."""
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(open(entry.file, "rb", buffering=0))
        except OSError as e:
            raise UserError(f"{entry.file}: cannot be read: {e.strerror}.") from e
        at = entry.start
        for n in _kernel_copy(source.fileno(), out.fileno(), entry):
            at += n
            progress(n)
        if at != entry.stop:
            raise UserError(
                f"{entry.file}: ends at byte {at} where {entry.stop} was expected; was it modified meanwhile?"
            )


def _kernel_copy(source: int, out: int, entry: Entry) -> Iterator[int]:
    """Appends the range to `out`, yielding the size of each copy; stops early if the source ends early."""
    copy = _copy_file_range if hasattr(os, "copy_file_range") else _sendfile
    at = entry.start
    while at < entry.stop:
        count = min(entry.stop - at, _COPY_BYTES)
        try:
            n = copy(source, out, at, count)
        except OSError:
            if copy is _sendfile:
                raise
            copy = _sendfile  # across file systems, or on one without copy_file_range
            continue
        if n == 0:
            if copy is _sendfile:
                return
            copy = _sendfile  # some file systems return 0 for "not supported"
            continue
        at += n
        yield n


def _copy_file_range(source: int, out: int, at: int, count: int) -> int:
    return os.copy_file_range(source, out, count, at)


def _sendfile(source: int, out: int, at: int, count: int) -> int:
    return os.sendfile(out, source, at, count)
