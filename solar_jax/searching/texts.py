"""Texts of a search: rows with the document that each of their targets belongs to, and where they come from."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tokenizers

from solar_jax.config import DataConfig
from solar_jax.data.corpus import AnyRows, Corpus, FirstRows, heldout_indices
from solar_jax.data.packing import Row, Rows, pack
from solar_jax.data.sources import Document, documents, sources_of
from solar_jax.errors import UserError

_CHARACTERS_A_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class SearchText:
    """Rows of T tokens, and the documents of their targets."""

    name: str
    rows: tuple[Row, ...]
    owners: np.ndarray  # [rows, T] int32, the document of each target; -1 where there is none
    documents: tuple[str, ...]

    @property
    def weights(self) -> np.ndarray:
        """[rows, T] float32."""
        return np.stack([row["weights"] for row in self.rows])

    @property
    def tokens(self) -> int:
        """Number of targets that count."""
        return int((self.weights > 0).sum())

    def sha256(self) -> str:
        """Hash of everything that losses on the rows depend on."""
        digest = hashlib.sha256()
        for row in self.rows:
            for name in sorted(row):
                digest.update(name.encode() + np.ascontiguousarray(row[name]).tobytes())
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """Description for a result's file."""
        return {
            "name": self.name, "documents": len(self.documents), "rows": len(self.rows), "tokens": self.tokens,
            "sha256": self.sha256(),
        }  # fmt: skip


def text_of_rows(name: str, places: Iterable[tuple[AnyRows, int]]) -> SearchText:
    """Builds a text of some rows of sources.

    Args:
      name: for messages and files.
      places: rows' sources and their indices.
    """
    rows, owners, known = [], [], {}
    for source, index in places:
        sizes, ids = _pieces(source, index)
        numbers = np.array([known.setdefault(x, len(known)) for x in ids], np.int32)
        # A piece's first token is no target; in one stream it is, of the piece before it.
        of = np.repeat(numbers, sizes)[1:] if _packing(source) == "concat" else np.repeat(numbers, sizes - 1)
        row = source[index]
        rows.append(row)
        owners.append(np.pad(of, (0, len(row["tokens"]) - len(of)), constant_values=-1))
    return SearchText(name, tuple(rows), np.stack(owners), tuple(known))


def _packing(source: AnyRows) -> str:
    return source.rows.packing if isinstance(source, FirstRows) else source.packing


def _pieces(source: AnyRows, index: int) -> tuple[np.ndarray, list[str]]:
    """Returns sizes and documents of a row's pieces; one document where a prepared row has several pieces of one."""
    if isinstance(source, Rows):
        _, sizes, owners = source.pieces(index)
        return sizes, [source.ids[i] for i in owners]
    _, sizes, _ = source.sequences(index)
    ids = source.documents(index)
    return sizes, ids if len(ids) == len(sizes) else [ids[0]] * len(sizes)


# ---- Where texts come from -------------------------------------------------------------------------------------------
def training_texts(corpus: Corpus, tokens: int, name: str = "") -> tuple[SearchText, SearchText]:
    """Returns the search text, and a final one as large, from different rows of a corpus's training part.

    Rows lie evenly spread over each source, whose share is that of its weight.

    Args:
      corpus: of a run.
      tokens: of the search text, about.
      name: of the sources.
    """
    total = sum(source.weight for source, _ in corpus.train)
    first, second = [], []
    for source, rows in corpus.train:
        length = len(rows[0]["tokens"])
        count = max(1, round(tokens * source.weight / total / length))
        places = np.unique(np.linspace(0, len(rows) - 1, min(2 * count, len(rows))).round().astype(int)).tolist()
        chosen = places[1::2] if len(places) > 1 else places
        first += [(rows, i) for i in chosen]
        second += [(rows, i) for i in places if i not in chosen]
    if not second:
        second = first
    return text_of_rows(f"{name} training", first), text_of_rows(f"{name} training, other rows", second)


def heldout_text(corpus: Corpus, windows: int, name: str = "") -> SearchText:
    """Returns the rows that a run of the corpus is evaluated on."""
    places = [(rows, i) for rows, indices in heldout_indices(corpus, windows) for i in indices]
    return text_of_rows(f"{name} held out", places)


def other_text(
    entry: str, tokenizer: tokenizers.Tokenizer, eos: int, length: int, windows: int, vocab_size: int
) -> SearchText:
    """Returns rows of another domain: the beginnings of a source's documents.

    Args:
      entry: as in config.data.sources.
      tokenizer, eos, vocab_size: of the model.
      length: T.
      windows: rows at most.

    Raises:
      UserError: the source cannot be read, or is too small for one row.
    """
    (source,) = sources_of(DataConfig(sources=(entry,)))
    rows = pack(_beginnings(documents(source), length, windows), tokenizer, eos, length, vocab_size=vocab_size)
    if not len(rows):
        raise UserError(f"--other: {source.path} has no text for one row of {length} tokens.")
    places = np.unique(np.linspace(0, len(rows) - 1, min(windows, len(rows))).round().astype(int)).tolist()
    return text_of_rows(source.path, [(rows, i) for i in places])


def _beginnings(found: Iterable[Document], length: int, windows: int) -> Iterator[Document]:
    """Yields the first row's worth of each document, until there are rows enough."""
    left = windows * length * _CHARACTERS_A_TOKEN * 2
    for document in found:
        text = document.text[: length * _CHARACTERS_A_TOKEN]
        yield dataclasses.replace(document, text=text)
        left -= len(text)
        if left < 0:
            return


def by_document(values: np.ndarray, text: SearchText, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sums of values and of weights over each document of a text, float64 [documents] each.

    Args:
      values: [rows, T], of consecutive rows.
      text: theirs.
      start: the first of the rows.
    """
    rows = slice(start, start + len(values))
    owners, counts = text.owners[rows], text.weights[rows].astype(np.float64)
    counts *= owners >= 0
    of, size = np.maximum(owners, 0).ravel(), len(text.documents)
    return np.bincount(of, (counts * values).ravel(), size), np.bincount(of, counts.ravel(), size)


def counts_of(text: SearchText) -> np.ndarray:
    """Number of targets that count of each document, float64 [documents]."""
    return by_document(np.zeros(text.owners.shape), text)[1]


def mean_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Mean a token of sums over documents, and its standard error with documents as the clusters.

    The ratio estimator's: sqrt(D / (D - 1) sum_d (s_d - m c_d)^2) / sum_d c_d, with m the mean and D documents.
    """
    total = counts.sum()
    mean, used = sums.sum() / total, int((counts > 0).sum())
    spread = np.square(sums - mean * counts).sum() * used / max(1, used - 1)
    return float(mean), float(np.sqrt(spread) / total)
