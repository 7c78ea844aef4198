"""Shards of one part of one source: each file is complete or absent, so that a killed run can resume."""

import base64
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from solar_jax.data.prepared import records
from solar_jax.data.prepared.blocks import Concat, DocumentBlock, Packed
from solar_jax.errors import UserError

BLOCKS_A_SHARD = 64

Facts = dict[str, Any]  # of a shard: what was read for it, and what it holds


class Shards:
    """Shards of 64 blocks each, fewer in the last one, written in the order of the blocks.

    A finished shard is a file of rows and a JSON file with its facts, written last. Blocks of shards that an earlier
    run finished need no work, but their documents are compared with those it read.
    """

    def __init__(self, folder: pathlib.Path, name: str, packing: str, length: int, dtype: str):
        self._folder, self._name, self._dtype = folder, name, dtype
        self._concat = Concat(length, dtype) if packing == "concat" else None
        self._digest = hashlib.blake2b(digest_size=16)
        self._read: list[Facts] = []  # per shard: "first" and "last" document, number of "blocks", hash of "input"
        self.finished: list[Facts] = []
        while self._facts_file(len(self.finished)).exists():
            self.finished.append(json.loads(self._facts_file(len(self.finished)).read_text()))
        self._resumed = len(self.finished)
        if self._concat is not None and self._resumed:
            (tokens, sizes, places), _ = records.decode(base64.b64decode(self.finished[-1]["left"]), dtype)
            self._concat.left = tokens, sizes.astype(np.int64), places.astype(np.int64)
        self._file: Any = None
        self._facts: Facts = {}

    def needs(self, block: DocumentBlock, digest: bytes) -> bool:
        """Records the next block, whose documents have that digest, and returns whether it must be processed.

        Raises:
          UserError: an earlier run made the previous shard from other documents.
        """
        if not self._read or self._read[-1]["blocks"] == BLOCKS_A_SHARD:
            self._compare()
            self._read.append({"first": block.documents[0].id, "blocks": 0})
        self._digest.update(digest)
        now = self._read[-1]
        now |= {"last": block.documents[-1].id, "blocks": now["blocks"] + 1, "input": self._digest.hexdigest()}
        return len(self._read) > self._resumed

    def add(self, packed: Packed) -> None:
        """Writes the rows of the next block that had to be processed.

        Raises:
          UserError: the disk is full or failing.
        """
        if self._file is None:
            self._partial().unlink(missing_ok=True)
            with self._told():
                self._file = records.writer(str(self._partial()))
            self._facts = {
                "done": 0,
                "rows": 0,
                "tokens": 0,
                "documents": 0,
                "document_tokens": 0,
                "matches": [],
                "left_out": {},
            }
        rows, targets = packed.rows, packed.targets
        if packed.stream is not None and self._concat is not None:
            rows, targets = self._concat(packed.stream)
        with self._told():
            for row in rows:
                self._file.write(row)
        added = {"done": 1, "rows": len(rows), "tokens": targets, "documents": packed.documents}
        for key, value in (added | {"document_tokens": packed.tokens}).items():
            self._facts[key] += value
        self._facts["matches"] += [[m.document, m.evaluation, m.words, m.places] for m in packed.matches]
        for reason, ids in packed.left_out.items():
            self._facts["left_out"].setdefault(reason, []).extend(ids)
        if self._facts["done"] == BLOCKS_A_SHARD:
            self._finish()

    def close(self) -> None:
        """Finishes the last shard, after all blocks have been read and written.

        Raises:
          UserError: an earlier run made shards from other documents; all shards are then removed.
        """
        self._compare(all_read=True)
        if self._file is not None:
            self._finish()

    def rows_file(self, shard: int) -> pathlib.Path:
        return self._folder / f"{self._name}-{shard:05d}.array_record"

    def _compare(self, all_read: bool = False) -> None:
        """Compares the shard read last with what an earlier run read for it."""
        shard = len(self._read) - 1
        same = True
        if 0 <= shard < self._resumed:
            same = all(self.finished[shard][key] == value for key, value in self._read[shard].items())
        if not same or (all_read and len(self._read) < self._resumed):
            shutil.rmtree(self._folder)
            raise UserError(
                f"{self._name}: the documents changed since an interrupted run of prepare read them; its shards were "
                "removed, so rerun the same command to start over."
            )

    def _finish(self) -> None:
        with self._told():
            self._file.close()
        self._file = None
        shard, partial = len(self.finished), self._partial()
        facts = self._facts | self._read[shard] | {"bytes": partial.stat().st_size}
        if self._concat is not None:
            facts["left"] = base64.b64encode(records.encode(self._concat.left, self._dtype)).decode()
        temporary = partial.with_suffix(".json")
        temporary.write_text(json.dumps(facts))
        for file, final in ((partial, self.rows_file(shard)), (temporary, self._facts_file(shard))):
            with file.open("rb") as f:
                os.fsync(f.fileno())
            os.replace(file, final)
        self.finished.append(facts)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Reports ArrayRecord's disk errors in one sentence."""
        try:
            yield
        except RuntimeError as e:
            reason = str(e).split(";")[0].strip()
            raise UserError(
                f"{self._folder.parent}: cannot be written: {reason}; the same command resumes from there."
            ) from e

    def _facts_file(self, shard: int) -> pathlib.Path:
        return self.rows_file(shard).with_suffix(".json")

    def _partial(self) -> pathlib.Path:
        return self._folder / f".{self._name}.partial"
