"""Text sources of config.data.sources: parsing of entries, iteration over documents, and the held-out split."""

import dataclasses
import glob
import hashlib
import heapq
import itertools
import pathlib
import platform
import re
from collections.abc import Callable, Iterator
from typing import Any

from solar_jax.config import DataConfig
from solar_jax.data.chat.formats import FORMS, contents, kind_of, read_record
from solar_jax.data.embedded import EMBEDDED, FUNCTIONS, TEXTS, records
from solar_jax.data.files import find_files
from solar_jax.data.readers import WHOLE, read_documents
from solar_jax.errors import UserError
from solar_jax.storage.paths import is_local

_NAMED = 4  # files or kinds that a message names
_SMALL = 8  # a source with fewer than this times `every` documents is split by rank, so that neither part is empty


MOST_PASSES = 4.0  # beyond some four passes over the same text, more of them are worth little (arXiv 2305.16264)


@dataclasses.dataclass(frozen=True)
class Source:
    path: str  # a file, folder, glob, URL of one, or a name in EMBEDDED
    weight: float = 1.0  # share of the tokens relative to the other sources
    text_key: str = "text"  # the column or JSON key that holds the text
    epochs: float = MOST_PASSES  # most passes that a run may make
    limit: int = 0  # training tokens to use; 0: all
    plain: bool = False  # every file is one document of plain text
    skip_empty: bool = True  # documents without text are skipped, not refused
    form: str = "text"  # or the form of its records, see data.chat.formats.read_record

    @property
    def kind(self) -> str:
        """ "text", or a name of data.chat.formats.KINDS."""
        return kind_of(self.form)


@dataclasses.dataclass(frozen=True)
class Document:
    id: str  # "FILE:RECORD", or "FILE" if the file is one document
    text: str  # of a record: that of its messages
    record: dict[str, Any] | None = None  # as the file holds it, where the source has conversations or pairs


_OPTION = r"\w+=[^&=?]*?"


def parse_sources(
    entries: tuple[str, ...], text_key: str = "text", skip_empty: bool = True, form: str = "text"
) -> list[Source]:
    """Parses entries of the form `PATH[?text=COLUMN&epochs=N&limit=TOKENS&as=text][:weight]`.

    Raises:
      UserError: a weight, epochs or limit is not positive, an option is unknown, or a source is listed twice.
    """
    sources: list[Source] = []
    for entry in entries:
        match = re.fullmatch(rf"(.+?)(?:\?({_OPTION}(?:&{_OPTION})*))?(?::(\d+(?:\.\d*)?|\.\d+))?", entry)
        if not match:
            raise UserError(f"config.data.sources: an entry must be PATH[?options][:weight], found {entry!r}.")
        path, weight = match[1], float(match[3] or 1)
        if weight <= 0:
            raise UserError(f"config.data.sources: the weight of {path} must be above 0, found {match[3]}.")
        options = dict(part.split("=") for part in match[2].split("&")) if match[2] else {}
        source = Source(path, weight, text_key, skip_empty=skip_empty, form=form)
        source = dataclasses.replace(source, **_options(path, options))
        if any((s.path, s.text_key) == (source.path, source.text_key) for s in sources):
            raise UserError(f"config.data.sources: {path} is listed twice; list it once, with the sum of the weights.")
        sources.append(source)
    return sources


def sources_of(cfg: DataConfig) -> list[Source]:
    """The sources that a config names; raises as `parse_sources`, or for a form of records that does not exist."""
    if cfg.format not in FORMS:
        raise UserError(f"config.data.format must be one of {', '.join(FORMS)}, found {cfg.format!r}.")
    return parse_sources(cfg.sources, cfg.text_key, cfg.skip_empty, cfg.format)


def check_sources(cfg: DataConfig) -> None:
    """Raises a UserError for an entry that is malformed or a local path that does not exist."""
    for source in sources_of(cfg):
        path = source.path
        if (
            path not in EMBEDDED
            and is_local(path)
            and not glob.has_magic(path)
            and not pathlib.Path(path).expanduser().exists()
        ):
            find_files(path)  # which raises


def _options(path: str, given: dict[str, str]) -> dict[str, Any]:
    """Returns the fields of a Source that an entry's options set."""
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name not in _FIELDS:
            raise UserError(
                f"config.data.sources: {path}: an option must be one of {', '.join(_FIELDS)}, found {name!r}."
            )
        field, kind, expected = _FIELDS[name]
        try:
            fields[field] = kind(value)
        except ValueError:
            fields[field] = None
        if not fields[field] or (kind is not str and fields[field] <= 0):
            raise UserError(f"config.data.sources: {path}: {name} must be {expected}, found {value!r}.")
    return fields


def _plain(text: str) -> bool:
    if text != "text":
        raise ValueError(text)
    return True


def _count(text: str) -> int:
    """Parses 1000000, 1_000_000 or 1e6."""
    return int(text) if text.replace("_", "").isdigit() else int(float(text))


# option -> (field of Source, its type, what it must be)
_FIELDS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "text": ("text_key", str, "the name of a column"),
    "epochs": ("epochs", float, "a number above 0"),
    "limit": ("limit", _count, "a number of tokens above 0"),
    "as": ("plain", _plain, "text"),
}


def documents(source: Source, on_empty: Callable[[], None] = lambda: None) -> Iterator[Document]:
    """Yields the documents of a source in a fixed order: files sorted by name, records in file order.

    Args:
      source: where the documents are.
      on_empty: called for each document without text, empty or null, that is skipped.

    Raises:
      UserError: the source is missing or damaged, or a document has no text and such are not skipped; the message
        names file, record and column.
    """
    if source.path in EMBEDDED:
        if (source.path in TEXTS) != (source.kind == "text"):
            holds = "text" if source.path in TEXTS else "conversations and pairs"
            raise UserError(f"config.data.sources: {source.path} holds {holds}; config.data.format is {source.form!r}.")
        if source.path in TEXTS:
            yield from (Document(f"{source.path}:{name}", text) for name, text in TEXTS[source.path]())
        else:
            for name, record in records(source.kind):
                found = read_record(record, f"{FUNCTIONS}:{name}", source.form)
                yield Document(f"{FUNCTIONS}:{name}", contents(found), record)
        return
    for file in find_files(source.path, source.plain).files:
        key = source.text_key if source.kind == "text" else WHOLE
        for number, found in read_documents(file, key, source.plain):
            name = file.name if number is None else f"{file.name}:{number}"
            if found and key == WHOLE:
                yield Document(name, contents(read_record(found, name, source.form)), found)
            elif found:
                yield Document(name, found)
            elif source.skip_empty:
                on_empty()
            else:
                raise UserError(f"{name}: has no text; config.data.skip_empty=True skips such documents.")


def choice(source: Source) -> str:
    """Describes which files of a source are read, and what lies beside them: the line that a run announces.

    Raises:
      UserError: as `documents`.
    """
    if source.path in EMBEDDED:
        return f"{source.path}, of this Python ({platform.python_version()})"
    found = find_files(source.path, source.plain)
    kinds = sorted({file.ending or "no ending" for file in found.files})
    said = f"{source.path}: {len(found.files):,} file(s) of {', '.join(kinds[:_NAMED])}"
    if found.guessed:
        said += ", taken as plain text, although not all endings say so"
    if found.left_out:
        more = f" and {len(found.left_out) - _NAMED:,} more" if len(found.left_out) > _NAMED else ""
        said += f"; left out: {', '.join(found.left_out[:_NAMED])}{more}"
    return said


# ---- Held-out split --------------------------------------------------------------------------------------------------
def is_held_out(document: Document, every: int) -> bool:
    """Returns whether a document is held out, by its text alone regardless of position: one in `every` of all texts."""
    return _rank(document) < _RANKS // every


_RANKS = 1 << 64


def _rank(document: Document) -> int:
    """Returns a hash of the text, below `_RANKS`."""
    return int.from_bytes(hashlib.blake2b(document.text.encode(), digest_size=8).digest(), "big")


@dataclasses.dataclass(frozen=True)
class Split:
    """Held-out rule of a source. It decides each document independently, so that many can be split at a time."""

    every: int
    rule: str  # "hash", "position" or "cut"
    below: int = 0  # hash: ranks below this are held out

    def parts(self, index: int, document: Document) -> tuple[Document | None, Document | None]:
        """Returns the (training, held-out) parts of document `index`, counted from 0 over non-empty documents."""
        if self.rule == "cut":
            text = document.text
            cut = len(text) - len(text) // self.every
            parts = (dataclasses.replace(document, text=text[:cut]), dataclasses.replace(document, text=text[cut:]))
            return parts if parts[1].text else (parts[0], None)
        held_out = index % self.every == 0 if self.rule == "position" else _rank(document) < self.below
        return (None, document) if held_out else (document, None)


def split(source: Source, every: int, rule: str) -> Split:
    """Decides how to hold out one in `every` documents of a source: by a hash of the text ("hash") or by position.

    With fewer than `every` documents, as in one long text file, each document is cut instead: its last part, one in
    `every` characters, is held out. With few documents and the hash rule, those of the lowest hashes are held out, in
    the same proportion as in a larger source. To tell these cases apart, the first documents are read.

    Raises:
      UserError: the source has no documents.
    """
    enough = every if rule == "position" else _SMALL * every
    first = list(itertools.islice((_rank(d) for d in documents(source)), enough))
    if not first:
        raise UserError(f"config.data.sources: {source.path}: holds no text, or only empty documents.")
    if len(first) < every and source.kind != "text":
        raise UserError(
            f"config.data.sources: {source.path}: has {len(first)} record(s), but one in "
            f"config.data.holdout_every={every} is held out; add records or lower it."
        )
    if len(first) < every:
        return Split(every, "cut")
    if rule == "position" or len(first) == enough:
        return Split(every, rule, _RANKS // every)
    return Split(every, rule, heapq.nsmallest(-(-len(first) // every), first)[-1] + 1)


def part(source: Source, how: Split, held_out: bool, on_empty: Callable[[], None] = lambda: None) -> Iterator[Document]:
    """Yields the training or the held-out documents of a source; `on_empty` as in `documents`."""
    for index, document in enumerate(documents(source, on_empty)):
        found = how.parts(index, document)[held_out]
        if found is not None:
            yield found
