"""Blocks, the unit of work of `prepare`: documents in, the records of their rows out, on any machine.

Blocks depend only on the order of the documents, so that the rows are the same for any number of workers.
"""

import dataclasses
import functools

import numpy as np
import tokenizers

from solar_jax.data.chat.encoding import Rules
from solar_jax.data.chat.rows import pack_records
from solar_jax.data.doubts import check_ids
from solar_jax.data.packing import Rows, cut_rows, pack, tokenise
from solar_jax.data.prepared import records
from solar_jax.data.prepared.decontamination import Index, Match
from solar_jax.data.sources import Document


@dataclasses.dataclass(frozen=True)
class Work:
    """Settings that process every block; sent to other processes or machines."""

    tokenizer: str  # tokenizer.json
    eos: int
    length: int  # T
    packing: str
    dtype: str  # of stored tokens
    evaluations: Index | None  # evaluation sets that no training document may share words with
    vocab_size: int = 0  # V of the model, which no token may exceed; 0 if unknown
    rules: Rules | None = None  # how records become tokens

    def __call__(self, block: "DocumentBlock") -> "Packed":
        return _packed(self, block)


@dataclasses.dataclass(frozen=True)
class DocumentBlock:
    """Consecutive documents of a source's training or held-out part."""

    name: str  # of the part
    searched: bool  # whether to look for words of evaluation sets
    documents: list[Document]
    places: np.ndarray  # [documents, 2] int64: file index and record
    digest: bytes  # of the documents and places
    read: int  # bytes of text, including documents dropped earlier


@dataclasses.dataclass(frozen=True)
class Packed:
    name: str
    read: int
    documents: int  # documents kept
    tokens: int  # of the documents, with end-of-sequence tokens
    targets: int  # of weight above 0, in rows
    rows: list[bytes]  # records; for concat, the parent process makes them
    stream: records.Pieces | None  # for concat: the documents' tokens, sizes and places
    matches: list[Match]  # documents that were dropped
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # ids of records by reason


def _packed(work: Work, block: DocumentBlock) -> Packed:
    documents, places, matches = block.documents, block.places, []
    if work.evaluations is not None and block.searched:
        found = [work.evaluations.matches(d) for d in documents]
        kept = [i for i, match in enumerate(found) if match is None]
        matches = [match for match in found if match is not None]
        documents, places = [documents[i] for i in kept], places[kept]
    if work.rules is not None:
        rows, account = pack_records(documents, work.rules, work.length, vocab_size=work.vocab_size)
        place_of = dict(zip((d.id for d in documents), places, strict=True))
        used = np.array([place_of[name] for name in rows.ids], np.int64).reshape(-1, 2)
        made = _encoded(rows, used, work.dtype)
        return Packed(
            block.name, block.read, account.records, account.tokens, rows.tokens, made, None, matches, account.left_out
        )
    tokenizer = _tokenizer(work.tokenizer)
    if work.packing == "concat":
        runs = tokenise([d.text for d in documents], tokenizer, work.eos)
        check_ids([d.id for d in documents], runs, tokenizer, work.vocab_size)
        sizes = np.array([len(run) for run in runs], np.int64)
        tokens = np.concatenate(runs).astype(work.dtype) if runs else np.empty(0, work.dtype)
        stream = tokens, sizes, places
        return Packed(block.name, block.read, len(documents), len(tokens), 0, [], stream, matches)
    rows = pack(documents, tokenizer, work.eos, work.length, packing=work.packing, vocab_size=work.vocab_size)
    made = _encoded(rows, places, work.dtype)
    return Packed(block.name, block.read, len(documents), len(rows.stream), rows.tokens, made, None, matches)


def _encoded(rows: Rows, places: np.ndarray, dtype: str) -> list[bytes]:
    """The records of packed rows; `places` [documents, 2] of their documents."""
    made = []
    for i in range(len(rows)):
        tokens, sizes, owners = rows.pieces(i)
        made.append(records.encode((tokens, sizes, places[owners]), dtype, rows.sequences(i)[2]))
    return made


@functools.lru_cache(maxsize=1)
def _tokenizer(text: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(text)


class Concat:
    """Concatenates the streams of consecutive blocks and cuts them every T."""

    def __init__(self, length: int, dtype: str):
        self._length, self._dtype = length, dtype
        self.left = np.empty(0, dtype), np.empty(0, np.int64), np.empty((0, 2), np.int64)

    def __call__(self, stream: records.Pieces) -> tuple[list[bytes], int]:
        """Returns the records that a block completes, and their number of targets with weight above 0 under masking."""
        tokens, sizes, places = (np.concatenate(both) for both in zip(self.left, stream, strict=True))
        starts = np.cumsum([0, *sizes], dtype=np.int64)
        _, cuts, owners, counts = cut_rows("concat", starts, 0, self._length)
        made, piece = [], 0
        for row, count in enumerate(counts):
            of = slice(piece, piece + count)
            window = tokens[row * self._length : (row + 1) * self._length + 1]
            made.append(records.encode((window, cuts[of], places[owners[of]]), self._dtype))
            piece += count
        begin = len(counts) * self._length
        first = int(np.searchsorted(starts, begin, side="right")) - 1 if len(sizes) else 0
        rest = sizes[first:].copy()
        if len(rest):
            rest[0] -= begin - starts[first]
        self.left = tokens[begin:], rest, places[first:]
        return made, int((cuts - 1).sum())
