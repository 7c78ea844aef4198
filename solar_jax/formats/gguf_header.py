"""GGUF headers: metadata and tensor byte ranges, read without loading any weights.

The package `gguf` also has a reader, but it trusts the counts and lengths in the file and builds an array per string,
which takes seconds for a vocabulary. The format is small, so we parse it ourselves and check every length first.
"""

import array
import math
import pathlib
import struct
import sys
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from solar_jax.errors import UserError
from solar_jax.formats.safetensors import Entry, check_disjoint

# Metadata value type number -> its `struct` format character.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_BYTES = 1 << 25  # of metadata; 262,144 tokens with their merges take 12 MB
_MOST_ITEMS = 1 << 16  # limit for metadata keys and for tensors
_MOST_STRINGS = 1 << 21  # in one array
_MOST_AXES = 4


class _Broken(Exception):
    """Raised for a malformed file; the text says what is wrong."""


class _Cursor:
    """Sequential reader that never reads past the end of the file, whatever length is requested."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left, self.position = file, min(size, _MOST_BYTES), 0

    def take(self, n: int) -> bytes:
        if n > self._left:
            raise _Broken(f"{n} bytes are declared at byte {self.position}, but at most {self._left} may follow")
        data = self._file.read(n)
        self._left -= n
        self.position += n
        if len(data) != n:
            raise _Broken(f"the file ends at byte {self.position - n + len(data)}")
        return data

    def scalar(self, letter: str) -> Any:
        (value,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(letter)))
        # A float32 1e-5 reads as 9.999999747e-06; take the shortest decimal that rounds to it.
        return float(str(np.float32(value))) if letter == "f" else value

    def count(self, what: str, most: int) -> int:
        n = self.scalar("Q")
        if n > most:
            raise _Broken(f"{n} {what} are declared, the limit is {most}")
        return n

    def text(self) -> str:
        data = self.take(self.scalar("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as e:
            raise _Broken(f"the text at byte {self.position - len(data)} is not UTF-8") from e

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _Broken(f"a value has the unknown type {kind}")
        of = self.scalar("I")
        if of == _STRING:
            return [self.text() for _ in range(self.count("strings", _MOST_STRINGS))]
        if of not in _SCALARS:
            raise _Broken(f"an array has elements of type {of}, which is not supported")
        letter, n = _SCALARS[of], self.scalar("Q")
        values = array.array(letter.replace("?", "B"))  # no memory overhead, unlike a list
        values.frombytes(self.take(n * values.itemsize))
        if sys.byteorder == "big":
            values.byteswap()
        return values


def read_header(file: pathlib.Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Reads metadata and tensor entries, both keyed by their GGUF names.

    Returns:
      Metadata: numbers, booleans, strings, arrays of numbers as array.array, arrays of strings as lists. Tensors:
      shapes in torch order, [out, in]; `code` is the name of the quantisation type.

    Raises:
      UserError: the file is not GGUF, is cut short or contradicts itself.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            return _read_header(file, _Cursor(f, size), size)
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror}.") from e
    except _Broken as e:
        raise UserError(f"{file}: is not a complete GGUF file: {e}.") from e


def _read_header(file: pathlib.Path, cursor: _Cursor, size: int) -> tuple[dict[str, Any], dict[str, Entry]]:
    if (magic := cursor.take(4)) != b"GGUF":
        raise _Broken(f"it begins with {magic!r}")
    version = cursor.scalar("I")
    if version not in (2, 3):
        big = " (is it big-endian?)" if version & 0xFFFF == 0 else ""
        raise _Broken(f"the format's version must be 2 or 3, found {version}{big}")
    tensors, keys = cursor.count("tensors", _MOST_ITEMS), cursor.count("metadata keys", _MOST_ITEMS)
    fields: dict[str, Any] = {}
    for _ in range(keys):
        key = _name(cursor)
        if key in fields:
            raise _Broken(f"the metadata key {key} appears twice")
        fields[key] = cursor.value(cursor.scalar("I"))
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = _name(cursor)
        if name in infos:
            raise _Broken(f"the tensor {name} appears twice")
        axes = cursor.scalar("I")
        if not 1 <= axes <= _MOST_AXES:
            raise _Broken(f"{name} has {axes} axes, expected 1 to {_MOST_AXES}")
        shape = tuple(reversed(struct.unpack(f"<{axes}Q", cursor.take(8 * axes))))
        infos[name] = (shape, cursor.scalar("I"), cursor.scalar("Q"))
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _Broken(f"general.alignment must be a power of two, found {alignment!r}")
    data = -(-cursor.position // alignment) * alignment
    entries = {name: _entry(file, name, *info, data, size) for name, info in infos.items()}
    check_disjoint(entries)
    return fields, entries


def _name(cursor: _Cursor) -> str:
    name = cursor.text()
    if not name.isprintable() or not 0 < len(name) < 256:
        raise _Broken(f"the name ending at byte {cursor.position} is not printable or too long")
    return name


def _entry(
    file: pathlib.Path, name: str, shape: tuple[int, ...], kind: int, offset: int, data: int, size: int
) -> Entry:
    """Validates one tensor's header entry; the file has `size` bytes and its data section starts at byte `data`."""
    try:
        quantisation = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[quantisation]
    except (ValueError, KeyError) as e:
        raise UserError(f"{file}: {name} has the unknown quantisation type {kind}.") from e
    if shape[-1] % block:
        raise UserError(f"{file}: {name} of {quantisation.name} needs rows divisible by {block}, found shape {shape}.")
    start = data + offset
    stop = start + math.prod(shape) // block * block_bytes
    if stop > size:
        raise UserError(f"{file}: {name} should end at byte {stop}, but the file ends at {size}; is it cut short?")
    return Entry(file, quantisation.name, shape, start, stop)


def short(value: Any) -> str:
    """Formats a value for a message, shortened to 80 characters."""
    text = repr(value[:80] if hasattr(value, "__getitem__") else value)
    return text if len(text) < 80 else f"{text[:80]}..."
