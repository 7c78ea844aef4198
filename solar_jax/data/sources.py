"""Text in: documents of files and of the embedded corpus, each split into training and held-out ones."""

import dataclasses
import glob
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Iterator

from solar_jax.errors import UserError

EMBEDDED = "pydoc-topics"


@dataclasses.dataclass(frozen=True)
class TextSource:
    path: str  # a file, folder, glob or EMBEDDED
    weight: float  # share of the rows, relative to the other sources'


@dataclasses.dataclass(frozen=True)
class Document:
    id: str  # "FILE:RECORD", or "FILE" where the file is one document
    text: str


def parse_sources(entries: tuple[str, ...]) -> list[TextSource]:
    """`PATH[:weight]` entries.

    Raises:
      UserError: a weight that is not positive.
    """
    sources = []
    for entry in entries:
        match = re.fullmatch(r"(.+?)(?::(\d+(?:\.\d*)?|\.\d+))?", entry)
        if not match:
            raise UserError(f"config.data.sources: an entry must be PATH[:weight], found {entry!r}.")
        weight = float(match[2] or 1)
        if weight <= 0:
            raise UserError(f"config.data.sources: the weight of {match[1]} must be above 0, found {match[2]}.")
        sources.append(TextSource(match[1], weight))
    return sources


def documents(source: TextSource, text_key: str) -> Iterator[str]:
    """The texts of a source in a fixed order: topics and files by name, JSONL records as they stand.

    A `.jsonl` file (or `.jsonl.gz`) holds one JSON object a line with the text under `text_key`; any other file is one
    document of UTF-8 text.

    Raises:
      UserError: no such file, or one that cannot be read, naming the file and line.
    """
    if source.path == EMBEDDED:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
        return
    for file in _files(source.path):
        yield from _read(file, text_key)


def _files(path: str) -> list[pathlib.Path]:
    root = pathlib.Path(path).expanduser()
    if root.is_dir():
        files = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
    elif root.is_file():
        files = [root]
    else:
        files = sorted(pathlib.Path(p) for p in glob.glob(str(root), recursive=True) if pathlib.Path(p).is_file())
    if not files and root.is_dir():
        raise UserError(f"config.data.sources: {path}: must hold files of text, found an empty folder.")
    if not files:
        raise UserError(f"config.data.sources: {path}: no such file, folder or pattern.")
    return files


def _read(file: pathlib.Path, text_key: str) -> Iterator[str]:
    open_bytes = gzip.open if file.suffix == ".gz" else open
    is_jsonl = file.name.removesuffix(".gz").endswith(".jsonl")
    try:
        with open_bytes(file, "rb") as f:
            if not is_jsonl:
                yield _decode(f.read(), str(file))
                return
            for number, line in enumerate(f, 1):
                if line.strip():
                    where = f"{file}:{number}"
                    yield _record(_decode(line, where), text_key, where)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{file}: cannot be read: {e}.") from e


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: is not UTF-8 text: {e.reason} at byte {e.start}.") from e


def _record(line: str, text_key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as e:
        raise UserError(f"{where}: is not JSON: {e}.") from e
    if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: must hold text under {text_key!r} (config.data.text_key), found {found}.")
    text = record[text_key]
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{where}: the text under {text_key!r} holds half a surrogate pair, which is no character."
        ) from e
    return text


def split(texts: list[str], holdout_every: int) -> tuple[list[str], list[str]]:
    """(training, held-out) documents: of every `holdout_every` the first is held out.

    A source with too few documents for that, such as one long text file, is cut instead: the last part of each
    document, one in `holdout_every` of its characters, is held out.
    """
    if len(texts) >= holdout_every:
        return [t for i, t in enumerate(texts) if i % holdout_every], texts[::holdout_every]
    cuts = [len(t) - len(t) // holdout_every for t in texts]
    return [t[:c] for t, c in zip(texts, cuts, strict=True)], [t[c:] for t, c in zip(texts, cuts, strict=True)]
