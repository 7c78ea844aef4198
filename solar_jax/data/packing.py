"""Packing of documents into fixed rows of T input tokens and their T targets: best fit, or concatenate and cut.

Best fit: documents are cut into pieces of T inputs, the last one shorter. Pieces are placed longest first, each in the
row with the least free space that still fits it. A piece attends only to itself and its positions start at 0, even if
it continues a document, since the part before it is in another row. Its targets are the document's own next tokens, so
the last input of a piece also has its true target. The end-of-sequence token is a target at the end of a document and
never an input. Padding is a segment of its own, with weight 0.

Concat: documents, each followed by the end-of-sequence token, form one stream that is cut every T; the rest is dropped.
"""

import bisect
import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import SupportsIndex

import numpy as np
import tokenizers

from solar_jax.data.doubts import check_ids
from solar_jax.data.sources import Document

Row = dict[str, np.ndarray]  # "tokens", "targets", "positions", "segment_ids" [T] int32 and "weights" [T] float32

_DOCUMENTS_AT_A_TIME = 256
_LONGEST_TEXT = 1 << 22  # characters tokenised at a time: the tokenizer needs about a hundred bytes of memory for each
# Pieces are packed within a block of documents, so that any number of workers packs the blocks with the same result. A
# block has about 64 rows of text or more, since each block ends with a few rows that are not full.
_BLOCK_CHARACTERS, _CHARACTERS_A_TOKEN, _ROWS_A_BLOCK = 1 << 22, 4, 64


@dataclasses.dataclass(frozen=True)
class Rows:
    """Random access to packed rows; row i is a pure function of i."""

    packing: str  # a name of `PACKINGS`
    length: int  # T
    mask_documents: bool  # no attention, position or target crosses a document boundary
    ids: Sequence[str]  # [documents]
    stream: np.ndarray  # [all tokens] int32, the documents in order, each followed by the end-of-sequence token
    # A piece is a run of the stream within one document and one row; its last token is only a target.
    begins: np.ndarray  # [pieces] int64, position of each piece's first token in the stream
    sizes: np.ndarray  # [pieces] int64, tokens
    owners: np.ndarray  # [pieces] int64, the document of each piece
    firsts: np.ndarray  # [rows + 1] int64, the first piece of each row; the pieces of a row are contiguous
    trained: np.ndarray | None = None  # [all tokens] bool, which of them are trained as targets; None: all

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def __getitem__(self, index: SupportsIndex) -> Row:
        tokens, sizes, trained = self.sequences(int(index))
        return unpack(self.packing, tokens, sizes, self.length, self.mask_documents, trained)

    @property
    def tokens(self) -> int:
        """Number of targets with weight above 0, over all rows."""
        if not self.mask_documents:
            return len(self) * self.length
        if self.trained is not None:
            return int(self.trained.sum() - self.trained[self.begins].sum())
        return int((self.sizes - 1).sum())

    def documents(self, index: int) -> list[str]:
        """Returns the ids of the documents in a row, in the row's order."""
        return list(dict.fromkeys(self.ids[owner] for owner in self.pieces(index)[2]))

    def pieces(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns row `index`: the concatenated tokens of its pieces [N] int32, their sizes [P] and documents [P]."""
        of = slice(*self.firsts[range(len(self))[index] :][:2])
        return self._of_row(self.stream, index), self.sizes[of], self.owners[of]

    def sequences(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Returns row `index`: tokens [N] int32, sizes [P], and which tokens are trained [N] bool, None for all."""
        tokens, sizes, _ = self.pieces(index)
        return tokens, sizes, None if self.trained is None else self._of_row(self.trained, index)

    def _of_row(self, stream: np.ndarray, index: int) -> np.ndarray:
        of = slice(*self.firsts[range(len(self))[index] :][:2])
        runs = zip(self.begins[of], self.sizes[of], strict=True)
        return np.concatenate([stream[begin : begin + size] for begin, size in runs])


def pack(
    documents: Iterable[Document], tokenizer: tokenizers.Tokenizer, eos: int, length: int, *,
    packing: str = "best_fit", mask_documents: bool = True, vocab_size: int = 0,
) -> Rows:  # fmt: skip
    """Packs documents into rows of T = `length` tokens.

    Args:
      documents: in a fixed order, which determines the rows.
      tokenizer: used without special tokens.
      eos: the end-of-sequence token.
      length: T.
      packing: a name of `PACKINGS`; best_fit requires mask_documents.
      mask_documents: False lets a token attend to all tokens before it in its row.
      vocab_size: V of the model; 0 if unknown.

    Raises:
      UserError: a document has a token beyond the model's embedding.
    """
    ids, groups, streams = [], [0], []
    for block in blocks(documents, length):
        runs = tokenise([d.text for d in block], tokenizer, eos)
        check_ids([d.id for d in block], runs, tokenizer, vocab_size)
        streams += runs
        ids += [d.id for d in block]
        groups.append(len(ids))
    starts = np.cumsum([0, *map(len, streams)], dtype=np.int64)
    if packing == "concat":  # a row may start in one block and end in the next
        groups = [0, len(ids)]
    found = [
        cut_rows(packing, starts[first : last + 1], first, length) for first, last in itertools.pairwise(groups)
    ] or [cut_rows(packing, starts, 0, length)]
    begins, sizes, owners, counts = (np.concatenate(parts) for parts in zip(*found, strict=True))
    stream = np.concatenate(streams) if streams else np.empty(0, np.int32)
    firsts = np.cumsum([0, *counts], dtype=np.int64)
    return Rows(packing, length, mask_documents, ids, stream, begins, sizes, owners, firsts)


def blocks(documents: Iterable[Document], length: int) -> Iterator[list[Document]]:
    """Yields blocks of consecutive documents, each of which is packed independently."""
    enough = block_characters(length)
    block, characters = [], 0
    for document in documents:
        block.append(document)
        characters += len(document.text)
        if characters >= enough:
            yield block
            block, characters = [], 0
    if block:
        yield block


def block_characters(length: int) -> int:
    """Returns the number of characters at which a block is closed."""
    return max(_BLOCK_CHARACTERS, _CHARACTERS_A_TOKEN * _ROWS_A_BLOCK * length)


def tokenise(texts: Sequence[str], tokenizer: tokenizers.Tokenizer, eos: int) -> list[np.ndarray]:
    """Returns the tokens of each text, int32, followed by `eos`."""
    parts = [(i, part) for i, text in enumerate(texts) for part in _parts(text)]
    found: list[list[np.ndarray]] = [[] for _ in texts]
    for k in range(0, len(parts), _DOCUMENTS_AT_A_TIME):
        some = parts[k : k + _DOCUMENTS_AT_A_TIME]
        encodings = tokenizer.encode_batch_fast([part for _, part in some], add_special_tokens=False)
        for (i, _), encoding in zip(some, encodings, strict=True):
            found[i].append(np.array(encoding.ids, np.int32))
    end = np.array([eos], np.int32)
    return [np.concatenate([*runs, end]) for runs in found]


def _parts(text: str) -> Iterator[str]:
    """Splits `text` into parts that fit in memory when tokenised, before a space where words are tokenised singly."""
    begin = 0
    while len(text) - begin > _LONGEST_TEXT:
        end = begin + _LONGEST_TEXT
        border = text.rfind(" ", begin + _LONGEST_TEXT // 2, end)
        # Not within a run of spaces, which may be a single token.
        while border > begin and (text[border - 1].isspace() or text[border + 1].isspace()):
            border = text.rfind(" ", begin + _LONGEST_TEXT // 2, border)
        end = border if border > begin else end
        yield text[begin:end]
        begin = end
    yield text[begin:]


Cuts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # begins, sizes, owners [pieces]; pieces per row [rows]


def cut_rows(packing: str, starts: np.ndarray, first: int, length: int) -> Cuts:
    """Cuts documents into pieces and assigns the pieces to rows.

    Args:
      packing: a name of `PACKINGS`.
      starts: [documents + 1] start of each document in a stream, and the end of the last.
      first: index of the first document.
      length: T.

    Returns:
      First token in the stream, size and document of each piece, ordered by row; the number of pieces of each row.
    """
    begins, sizes, owners, counts = PACKINGS[packing].cut(starts, length)
    return begins, sizes, owners + first, counts


def _cut_best_fit(starts: np.ndarray, length: int) -> Cuts:
    inputs = np.diff(starts) - 1  # of each document
    counts = -(-inputs // length)
    owners = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each piece within its document
    begins = starts[:-1][owners] + number * length
    sizes = np.minimum(begins + length, starts[1:][owners] - 1) - begins  # inputs
    rows = best_fit(sizes, length)
    order = np.argsort(rows, kind="stable")
    return begins[order], sizes[order] + 1, owners[order], np.bincount(rows) if len(rows) else rows


def best_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """Returns the row of each piece [pieces]: longest first, each where the least free space remains. Rows are numbered
    from 0 in the order of their first pieces. O(n log n)."""
    rows = np.empty(len(sizes), np.int64)
    free: dict[int, list[int]] = collections.defaultdict(list)  # free space -> the rows that have it
    rooms: list[int] = []  # keys of `free` with at least one row, ascending
    made = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            row, left, made = made, room - size, made + 1
        else:
            left = rooms[at] - size
            row = free[rooms[at]].pop()
            if not free[rooms[at]]:
                del rooms[at]
        rows[piece] = row
        if left and not free[left]:
            bisect.insort(rooms, left)
        if left:
            free[left].append(row)
    _, first, rows = np.unique(rows, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[rows]


def _cut_concat(starts: np.ndarray, length: int) -> Cuts:
    begin = np.arange(max(0, (starts[-1] - starts[0] - 1) // length)) * length + starts[0]  # of each row
    end = begin + length + 1  # one past the inputs, for the last target
    first, last = (np.searchsorted(starts, place, side="right") - 1 for place in (begin, end - 1))
    counts = last - first + 1
    row = np.repeat(np.arange(len(begin)), counts)
    owners = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts - first, counts)
    begins = np.maximum(starts[owners], begin[row])
    return begins, np.minimum(starts[owners + 1], end[row]) - begins, owners, counts


def unpack(
    packing: str, tokens: np.ndarray, sizes: np.ndarray, length: int, mask_documents: bool,
    trained: np.ndarray | None = None,
) -> Row:  # fmt: skip
    """Builds a row of T = `length` from pieces, each with its last target.

    Args:
      packing: a name of `PACKINGS`.
      tokens: [N], the concatenated pieces.
      sizes: [P], the pieces' tokens.
      length: T.
      mask_documents: whether a token sees only its own document.
      trained: [N] bool, the targets that count; None: all. Only of best_fit.
    """
    row = PACKINGS[packing].unpack(tokens.astype(np.int32), sizes.astype(np.int64), length, mask_documents)
    if trained is not None:
        targets = np.delete(trained, np.cumsum(sizes) - sizes)
        row["weights"] = np.pad(targets.astype(np.float32), (0, length - len(targets)))
    return row


def _unpack_best_fit(tokens: np.ndarray, sizes: np.ndarray, length: int, mask_documents: bool) -> Row:
    del mask_documents  # always masked
    ends = np.cumsum(sizes)
    runs = [*(sizes - 1), length - len(tokens) + len(sizes)]  # inputs of each segment; the last is padding
    filled = length - runs[-1]
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets")}
    row["tokens"][:filled] = np.delete(tokens, ends - 1)
    row["targets"][:filled] = np.delete(tokens, ends - sizes)
    row["positions"] = np.concatenate([np.arange(n, dtype=np.int32) for n in runs])
    row["segment_ids"] = np.repeat(np.arange(len(runs), dtype=np.int32), runs)
    return row | {"weights": (np.arange(length) < filled).astype(np.float32)}


def _unpack_concat(tokens: np.ndarray, sizes: np.ndarray, length: int, mask_documents: bool) -> Row:
    place = np.arange(length, dtype=np.int32)
    row = {"tokens": tokens[:-1], "targets": tokens[1:], "positions": place}
    row |= {"segment_ids": np.zeros(length, np.int32), "weights": np.ones(length, np.float32)}
    if mask_documents:
        document = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        row["segment_ids"] = document[:-1]
        row["positions"] = place - (np.cumsum(sizes) - sizes).astype(np.int32)[document[:-1]]
        row["weights"][document[1:] != document[:-1]] = 0  # the target belongs to another document
    return row


@dataclasses.dataclass(frozen=True)
class Packing:
    cut: Callable[[np.ndarray, int], Cuts]
    unpack: Callable[[np.ndarray, np.ndarray, int, bool], Row]


PACKINGS = {"best_fit": Packing(_cut_best_fit, _unpack_best_fit), "concat": Packing(_cut_concat, _unpack_concat)}
