"""Builds prepared shards from sources: reads documents in order, drops duplicates, processes blocks, writes rows.

The order of the documents determines which ones are duplicates and the block of each one, and so every output byte.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from solar_jax.config import DataConfig
from solar_jax.data.packing import block_characters
from solar_jax.data.prepared import records
from solar_jax.data.prepared.blocks import DocumentBlock, Work
from solar_jax.data.prepared.engines import ENGINES
from solar_jax.data.prepared.shards import Shards
from solar_jax.data.sources import Document, Source, documents, sources_of, split

PARTS = ("train", "heldout")
SHARDS = "shards"  # folder of shards that have no final number yet
DUPLICATES = "duplicates.jsonl"


@dataclasses.dataclass
class SourceFacts:
    """Counts of what was read from a source, and the shards made from it."""

    source: Source
    holdout: str  # rule by which its documents were held out
    files: dict[str, int] = dataclasses.field(default_factory=dict)  # name -> index, by first document
    documents: int = 0
    bytes: int = 0  # of UTF-8 text
    duplicates: int = 0
    empty: int = 0  # documents without text, which are skipped
    shards: dict[str, Shards] = dataclasses.field(default_factory=dict)  # by part


def write_shards(
    cfg: DataConfig, work: Work, folder: pathlib.Path, *, dedup: bool, engine: str, workers: int,
    progress: Callable[[int], None],
) -> list[SourceFacts]:  # fmt: skip
    """Fills `folder` with the shards of every source; shards that an earlier run finished are kept.

    Args:
      cfg: the sources and the format of their rows.
      work: applied to each block.
      folder: receives a folder of shards and the report of duplicates.
      dedup: drop documents whose text occurred earlier, in any source.
      engine: a name of `ENGINES`.
      workers: number of the engine's workers.
      progress: called with the bytes of text processed since its last call.

    Raises:
      UserError: a source is missing or damaged, or differs from what an interrupted run read.
    """
    (folder / SHARDS).mkdir(exist_ok=True)
    found: list[SourceFacts] = []
    writers: dict[str, Shards] = {}

    with (folder / DUPLICATES).open("w") if dedup else contextlib.nullcontext() as report:
        seen = _Seen(report) if dedup else None

        def jobs() -> Iterator[DocumentBlock]:
            for index, source in enumerate(sources_of(cfg)):
                facts = SourceFacts(source, "")
                found.append(facts)
                for part in PARTS:
                    name = f"{index}-{part}"
                    facts.shards[part] = writers[name] = Shards(
                        folder / SHARDS, name, cfg.packing, cfg.sequence_length, work.dtype
                    )
                for block in _blocks(index, source, cfg, facts, seen):
                    if writers[block.name].needs(block, block.digest):
                        yield block
                    else:
                        progress(block.read)

        for packed in ENGINES[engine](work, jobs(), workers):
            writers[packed.name].add(packed)
            progress(packed.read)
    for shards in writers.values():
        shards.close()
    if not dedup:
        (folder / DUPLICATES).unlink(missing_ok=True)
    return found


class _Seen:
    """Hashes of all texts so far, with the id of the first document of each: about 250 bytes per document."""

    def __init__(self, report: Any):
        self._first: dict[bytes, str] = {}
        self._report = report

    def __call__(self, document: Document, digest: bytes) -> bool:
        if (first := self._first.setdefault(digest, document.id)) is document.id:
            return False
        self._report.write(json.dumps({"document": document.id, "same_as": first}) + "\n")
        return True


@dataclasses.dataclass
class _Open:
    """A block that is still being filled."""

    documents: list[Document] = dataclasses.field(default_factory=list)
    places: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    digest: Any = dataclasses.field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    characters: int = 0
    read: int = 0

    def add(self, document: Document, place: tuple[int, int], digest: bytes) -> None:
        self.documents.append(document)
        self.places.append(place)
        self.digest.update(digest + struct.pack("<qqq", *place, len(document.text)))
        self.characters += len(document.text)

    def close(self, index: int, part: str) -> DocumentBlock:
        places = np.array(self.places, np.int64).reshape(-1, 2)
        # Held-out documents are not trained on, so they may contain evaluation sets.
        return DocumentBlock(
            f"{index}-{part}", part == "train", self.documents, places, self.digest.digest(), self.read
        )


def _blocks(
    index: int, source: Source, cfg: DataConfig, facts: SourceFacts, seen: _Seen | None
) -> Iterator[DocumentBlock]:
    """Yields the blocks of a source, each as soon as its last document has been read."""
    how = split(source, cfg.holdout_every, cfg.holdout)
    facts.holdout = how.rule
    enough, blocks = block_characters(cfg.sequence_length), {part: _Open() for part in PARTS}

    def on_empty() -> None:
        facts.empty += 1

    for number, document in enumerate(documents(source, on_empty)):
        data = document.text.encode()
        if document.record is not None:
            data += json.dumps(document.record, sort_keys=True, default=str).encode()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        facts.documents += 1
        facts.bytes += len(data)
        blocks["train"].read += len(data)
        if seen is not None and seen(document, digest):
            facts.duplicates += 1
            continue
        file, record = records.place(document.id)
        place = facts.files.setdefault(file, len(facts.files)), record
        for part, its in zip(PARTS, how.parts(number, document), strict=True):
            if its is None:
                continue
            blocks[part].add(its, place, digest)
            if blocks[part].characters >= enough:
                yield blocks[part].close(index, part)
                blocks[part] = _Open()
    for part in PARTS:
        if blocks[part].documents:
            yield blocks[part].close(index, part)
