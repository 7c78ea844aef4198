"""Readers of file formats: yield the records of one file as (number, text), or as (number, record).

Lines are numbered from 1, as in editors, and rows from 0, as in `datasets`.
"""

import codecs
import contextlib
import gzip
import importlib
import io
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from solar_jax.data.files import File
from solar_jax.data.kinds import REFUSED
from solar_jax.errors import UserError

Record = tuple[int | None, Any]  # number and text, "" for null, or a record's keys; None: the file is one document
WHOLE = ""  # in place of a text's key: whole records
_LONGEST_LINE = 1 << 30  # bytes; a file with a longer line is not JSONL
_AT_A_TIME = 1 << 20  # bytes of a decompressed stream
_ROWS_AT_A_TIME = 128
# Exceptions that libraries raise for a damaged file; pyarrow's derive from these.
_DAMAGE = (OSError, EOFError, ValueError, RuntimeError, zlib.error)
_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def read_documents(file: File, text_key: str, plain: bool = False) -> Iterator[Record]:
    """Yields the records of a file, whose ending selects the reader.

    Args:
      file: local or remote.
      text_key: key or column of the text; `WHOLE` for records with all their keys.
      plain: read any file as one document of plain text.

    Raises:
      UserError: the file is damaged, is known to be no text, or lacks text where expected; the message names file,
        record and column.
    """
    if not plain and file.ending in REFUSED:
        raise UserError(f"{file.name}: {REFUSED[file.ending]}.")
    reader = _text if plain else READERS.get(file.ending, _text)
    if text_key == WHOLE and reader is _text:
        raise UserError(
            f"{file.name}: must hold records (.jsonl, .json, .parquet, .arrow or .array_record), found "
            f"{file.ending or 'no ending'}."
        )
    last: int | None = None
    try:
        for last, text in reader(file, text_key):
            yield last, text
    except _DAMAGE as e:
        after = f" after record {last}" if last is not None else ""
        raise UserError(f"{file.name}: cannot be read{after}: {_sentence(e)}.") from e


def _sentence(e: Exception) -> str:
    return " ".join(str(e).split()).rstrip(".") or type(e).__name__


@contextlib.contextmanager
def _decompressed(file: File) -> Iterator[BinaryIO]:
    with file.open() as f:
        if file.suffixes[:1] == [".gz"]:
            with gzip.open(f, "rb") as unzipped:
                yield io.BufferedReader(unzipped, _AT_A_TIME)  # type: ignore[arg-type]
        elif file.suffixes[:1] == [".zst"]:
            arrow = pyarrow("", file.name)
            stream = arrow.CompressedInputStream(arrow.PythonFile(f, mode="r"), "zstd")
            yield io.BufferedReader(stream, _AT_A_TIME)
        else:
            yield f


def pyarrow(module: str, file: str) -> Any:
    """Imports a module of pyarrow, which reads `file`.

    Raises:
      UserError: pyarrow is not installed.
    """
    try:
        return importlib.import_module(f"pyarrow{module}")
    except ImportError as e:
        kind = pathlib.PurePosixPath(file).suffix.lower()
        raise UserError(
            f"{file}: {kind} files are read with pyarrow, which is not installed; it comes with the extra `data`."
        ) from e


# ---- text and JSONL --------------------------------------------------------------------------------------------------
def _text(file: File, text_key: str) -> Iterator[Record]:
    """Yields the entire file as one document."""
    del text_key
    with _decompressed(file) as f:
        yield None, _decode(f.read(), file.name, first=True)


def _jsonl(file: File, text_key: str) -> Iterator[Record]:
    with _decompressed(file) as f:
        number = 0
        while line := f.readline(_LONGEST_LINE):
            number += 1
            where = f"{file.name}:{number}"
            if len(line) == _LONGEST_LINE:
                raise UserError(f"{where}: is a line of more than {_LONGEST_LINE:,} bytes, so the file is not JSONL.")
            if line.strip():
                yield number, _from_json(_decode(line, where, first=number == 1), text_key, where)


def _json(file: File, text_key: str) -> Iterator[Record]:
    """Reads one array of records, or records one after another, on lines or not; the first character decides which."""
    with _decompressed(file) as f:
        for number, value in enumerate(_json_values(f, file.name)):
            yield number, _field(value, text_key, f"{file.name}:{number}")


def _json_values(f: BinaryIO, name: str) -> Iterator[Any]:
    """Yields the elements of an array, or consecutive values, holding one at a time in memory."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    text, size, number, end = "", _AT_A_TIME, 0, ""
    while True:
        data = f.read(size)
        try:
            text += utf8.decode(data, not data)
        except UnicodeDecodeError as e:
            why = f"it starts with a {_MARKS[data[:2]]} BOM" if data[:2] in _MARKS else e.reason
            raise UserError(f"{name}: is not UTF-8 text: {why}.") from e
        while text := text.lstrip(" \t\r\n," if end == "]" else " \t\r\n"):
            if not number and not end and text[0] == "[":
                end, text = "]", text[1:]
                continue
            if end == "]" and text[0] == "]":
                end, text = "ended", text[1:]
                continue
            if end == "ended":
                raise UserError(f"{name}: is not JSON: something follows its array.")
            try:
                value, used = decoder.raw_decode(text)
            except (ValueError, RecursionError) as e:
                if data and len(text) < _LONGEST_LINE:
                    break  # the value may go on
                raise UserError(f"{name}:{number}: is not JSON: {e}.") from e
            yield value
            number, text = number + 1, text[used:]
        size = max(_AT_A_TIME, len(text))  # a long value is not tried again too often
        if not data:
            break
    if end == "]":
        raise UserError(f"{name}: is not JSON: its array is cut short after {number} records.")


def _decode(data: bytes, where: str, first: bool = False) -> str:
    """Decodes UTF-8 text, with CRLF turned into LF and without a leading byte order mark."""
    if first:
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        mark = _MARKS.get(data[:2]) if first else None
        found = f"it starts with a {mark} BOM" if mark else f"{e.reason} at byte {e.start}"
        raise UserError(f"{where}: is not UTF-8 text: {found}.") from e
    if "\0" in text:
        raise UserError(f"{where}: is not text: it has a NUL at character {text.index(chr(0))}.")
    return text


def _from_json(line: str, text_key: str, where: str) -> Any:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: is not JSON: {e}.") from e
    return _field(record, text_key, where)


def _field(record: Any, text_key: str, where: str) -> Any:
    if text_key == WHOLE:
        return record
    if isinstance(record, dict) and record.get(text_key, 0) is None:
        return ""
    if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
        found = type(record).__name__
        if isinstance(record, dict):
            value = f" with {type(record[text_key]).__name__} there" if text_key in record else ""
            found = f"{sorted(record)}{value}"
        raise UserError(f"{where}: must hold text under {text_key!r} (config.data.text_key or ?text=), found {found}.")
    text = record[text_key]
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: the text under {text_key!r} has a lone surrogate, which is not a character.") from e
    return text


# ---- columns ---------------------------------------------------------------------------------------------------------
def _parquet(file: File, text_key: str) -> Iterator[Record]:
    parquet = pyarrow(".parquet", file.name)
    with file.open() as f:
        table = parquet.ParquetFile(f, pre_buffer=False)
        _check_column(table.schema_arrow, text_key, file)
        yield from _rows(table.iter_batches(_ROWS_AT_A_TIME, columns=[text_key] if text_key else None), text_key, file)


def _arrow(file: File, text_key: str) -> Iterator[Record]:
    """Reads Arrow IPC, as a stream (which `datasets` writes) or as a file."""
    ipc = pyarrow(".ipc", file.name)
    with file.open() as f:
        if f.read(6) == b"ARROW1":
            table = ipc.open_file(f)
            batches: Iterator[Any] = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            f.seek(0)
            table = ipc.open_stream(f)
            batches = iter(table)
        _check_column(table.schema, text_key, file)
        yield from _rows(batches, text_key, file)


def _check_column(schema: Any, text_key: str, file: File) -> None:
    """Raises a UserError unless a table has a text column `text_key`, where one is named."""
    if text_key == WHOLE:
        return
    if text_key not in schema.names:
        raise UserError(
            f"{file.name}: must have a column {text_key!r} (config.data.text_key or ?text=), found {schema.names}."
        )
    kind = schema.field(text_key).type
    if not _is_text(kind):
        raise UserError(f"{file.name}: the column {text_key!r} must hold text, found {kind}.")


def _is_text(kind: Any) -> bool:
    types = pyarrow(".types", "")
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _rows(batches: Iterator[Any], text_key: str, file: File) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for value in batch.column(text_key) if text_key else batch.to_struct_array():
            where = f"{file.name}:{number}"
            try:
                found = value.as_py()
            except UnicodeDecodeError as e:
                under = f"under {text_key!r} " if text_key else ""
                raise UserError(f"{where}: the text {under}is not UTF-8: {e.reason}.") from e
            yield number, found or ""
            number += 1


# ---- ArrayRecord -----------------------------------------------------------------------------------------------------
def _array_record(file: File, text_key: str) -> Iterator[Record]:
    """Reads records of JSON with the text under a key, or of plain text; the first record of a file decides which."""
    from array_record.python import array_record_module  # part of grain

    with file.local() as path:
        if not _size(path):
            raise UserError(f"{file.name}: must hold records, found an empty file.")
        reader = array_record_module.ArrayRecordReader(path)
        count = reader.num_records()
        if not count:  # as for anything that is not a complete ArrayRecord file
            with contextlib.suppress(RuntimeError):
                reader.close()
            raise UserError(f"{file.name}: has no records; it is cut short, or not an ArrayRecord file.")
        is_json: bool | None = None
        for begin in range(0, count, _ROWS_AT_A_TIME):
            numbers = range(begin, min(begin + _ROWS_AT_A_TIME, count))
            for number, data in zip(numbers, reader.read(list(numbers)), strict=True):
                where = f"{file.name}:{number}"
                text = _decode(data, where)
                if is_json is None:
                    is_json = _is_object(text)
                if text_key == WHOLE and not is_json:
                    raise UserError(f"{where}: must hold a record as JSON, found text.")
                yield number, _from_json(text, text_key, where) if is_json else text
        reader.close()


def _size(path: str) -> int:
    with open(path, "rb") as f:
        return f.seek(0, io.SEEK_END)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


# Ending of a file's name -> its reader; any other file is one document of text.
READERS: dict[str, Callable[[File, str], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".array_record": _array_record,
}
