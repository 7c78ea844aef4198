"""The safetensors format, read by memory map and written as a stream.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}} and the data. It is small
enough to handle ourselves, which keeps bfloat16 exact, checks every range, and never copies a tensor to look at it.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from solar_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: pathlib.Path
    code: str  # the file's dtype name
    shape: tuple[int, ...]
    start: int  # byte in the file
    stop: int


def read_header(file: pathlib.Path) -> dict[str, Entry]:
    """Every tensor of a file, its range checked against the file's size.

    Raises:
      UserError: the file is not safetensors, is cut short, or its header contradicts itself.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise UserError(
                    f"{file}: a header of {length} bytes does not fit a file of {size} bytes; is it cut short?"
                )
            header = json.loads(f.read(length))
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: the header is not JSON: {e}.") from e
    if not isinstance(header, dict):
        raise UserError(f"{file}: the header must be a JSON object, found {type(header).__name__}.")
    return {name: _entry(file, name, info, 8 + length, size) for name, info in header.items() if name != "__metadata__"}


def _entry(file: pathlib.Path, name: str, info: Any, data: int, size: int) -> Entry:
    """One tensor of a header whose data begin at byte `data` of a file of `size` bytes, checked."""
    if not name.isprintable():
        raise UserError(f"{file}: a tensor's name is not printable: {name!r}.")
    try:
        code, shape, (start, stop) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    except (TypeError, KeyError, ValueError) as e:
        raise UserError(f"{file}: the header's entry of {name} is malformed: {info!r}.") from e
    if not isinstance(code, str) or not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise UserError(f"{file}: the header's entry of {name} is malformed: {info!r}.")
    start, stop = data + start, data + stop
    if not start <= stop <= size:
        raise UserError(
            f"{file}: {name} should lie in bytes {start}..{stop}, but the file ends at {size}; is it cut short?"
        )
    if code in DTYPES and math.prod(shape) * DTYPES[code].itemsize != stop - start:
        raise UserError(f"{file}: {name} of {code} {shape} does not take {stop - start} bytes.")
    return Entry(file, code, shape, start, stop)


def read(name: str, entry: Entry) -> np.ndarray:
    """The tensor as a read-only view of the file.

    Raises:
      UserError: the dtype is not float32, bfloat16 or float16.
    """
    if entry.code not in DTYPES:
        raise UserError(f"{entry.file}: {name} must be one of {', '.join(DTYPES)}, found {entry.code}.")
    if entry.start == entry.stop:
        return np.empty(entry.shape, DTYPES[entry.code])
    return np.memmap(entry.file, DTYPES[entry.code], "r", entry.start, entry.shape)


def write(
    file: pathlib.Path,
    tensors: list[tuple[str, tuple[int, ...]]],
    dtype: np.dtype,
    get: Callable[[str], np.ndarray],
) -> None:
    """Writes tensors in order, holding one at a time.

    Args:
      file: the target; must not exist.
      tensors: (name, shape) in order.
      dtype: of all of them.
      get: the tensor of a name.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    blob = json.dumps(header, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    with open(file, "xb") as f:
        f.write(len(blob).to_bytes(8, "little") + blob)
        for name, shape in tensors:
            x = np.ascontiguousarray(get(name), dtype)
            if x.shape != shape:
                raise ValueError(f"{name} has shape {x.shape}, the header says {shape}.")
            f.write(x.reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())
