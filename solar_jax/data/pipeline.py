"""Rows to batches: the global batch of a step is a pure function of the step, whatever the hosts and devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
import tokenizers

from solar_jax.config import DataConfig
from solar_jax.data.packing import Row, Rows, pack
from solar_jax.data.sources import Document, TextSource, documents, parse_sources, split
from solar_jax.errors import UserError

Batch = dict[str, jax.Array]  # a Row's arrays with a leading B


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a run trains and is evaluated on."""

    train: list[tuple[TextSource, Rows]]
    heldout: list[tuple[TextSource, Rows]]


def load_corpus(cfg: DataConfig, tokenizer: tokenizers.Tokenizer, eos: int) -> Corpus:
    """Reads, splits, tokenises and packs every source.

    Raises:
      UserError: a source cannot be read, or is too small for one row of either part.
    """
    train, heldout = [], []
    for source in parse_sources(cfg.sources):
        texts = [text for text in documents(source, cfg.text_key) if text]
        for part, into, name in zip(
            split(texts, cfg.holdout_every), (train, heldout), ("training", "held-out"), strict=True
        ):
            named = [Document(f"{source.path}:{i}", text) for i, text in enumerate(part, 1)]
            rows = pack(
                named, tokenizer, eos, cfg.sequence_length, packing=cfg.packing, mask_documents=cfg.mask_documents
            )
            if not len(rows):
                raise UserError(
                    f"config.data.sources: {source.path} has {len(rows.stream)} {name} tokens, but a row of "
                    f"config.data.sequence_length={cfg.sequence_length} needs {cfg.sequence_length + 1}."
                )
            into.append((source, rows))
    return Corpus(train, heldout)


def training_rows(corpus: Corpus, seed: int) -> grain.MapDataset:
    """An endless dataset of rows: each source shuffled anew every pass, mixed by weight."""
    parts = [
        grain.MapDataset.source(rows).seed(seed + i).shuffle().repeat(None) for i, (_, rows) in enumerate(corpus.train)
    ]
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, weights=[source.weight for source, _ in corpus.train])


def heldout_rows(corpus: Corpus, windows: int) -> list[Row]:
    """The first held-out rows of every source, `windows` in all, shared by weight; fewer where there are fewer."""
    total = sum(source.weight for source, _ in corpus.heldout)
    out: list[Row] = []
    upto = 0.0
    for source, rows in corpus.heldout:
        begin, upto = upto, upto + windows * source.weight / total
        out += [rows[i] for i in range(min(round(upto) - round(begin), len(rows)))]
    return out


def training_batch(rows: grain.MapDataset, step: int, size: int, padded: int, sharding: jax.sharding.Sharding) -> Batch:
    """The global batch of a step: rows step * B up to (step + 1) * B, each device reading its own.

    Args:
      rows: of `training_rows`.
      step: counted from 0.
      size: B.
      padded: rows of the result, at least B; those after B are copies of weight 0, which change no sum.
      sharding: of the rows.

    Returns:
      Arrays [padded, T].
    """

    def row(i: int) -> Row:
        found: Any = rows[step * size + min(i, size - 1)]
        return found if i < size else _filler(found)

    return _place(row, padded, sharding)


def heldout_batches(rows: list[Row], size: int, sharding: jax.sharding.Sharding) -> list[Batch]:
    """All held-out rows in batches [size, T]; the last is filled up with rows of weight 0."""
    padded = rows + [_filler(rows[0])] * (-len(rows) % size)
    return [_place(lambda i, k=k: padded[k + i], size, sharding) for k in range(0, len(padded), size)]


def _filler(row: Row) -> Row:
    return row | {"weights": np.zeros_like(row["weights"])}


def _place(row: Callable[[int], Row], size: int, sharding: jax.sharding.Sharding) -> Batch:
    """Rows 0..B as arrays laid out by `sharding`; only the rows of this process's devices are made."""
    cached = functools.cache(row)

    def part(name: str, index: Any) -> np.ndarray:
        return np.stack([cached(i)[name] for i in range(size)[index[0]]])[:, *index[1:]]

    local: Any = sharding.addressable_devices_indices_map((size,)).values()
    example = cached(min(range(size)[index[0]][0] for index in local))
    return {
        name: jax.make_array_from_callback((size, *value.shape), sharding, functools.partial(part, name))
        for name, value in example.items()
    }
