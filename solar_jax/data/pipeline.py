"""Batches from rows: a global batch is a function of the number of rows before it, for any hosts and devices."""

import dataclasses
import signal
from collections.abc import Sequence
from typing import Any, SupportsIndex

import grain
import jax
import numpy as np

from solar_jax.data.chat.pairs import LogProbs, row_with
from solar_jax.data.corpus import AnyRows, Corpus
from solar_jax.data.mixture import Mixture, row_shares, rows_of
from solar_jax.data.packing import Row
from solar_jax.data.sources import MOST_PASSES
from solar_jax.data.workers import end_with_parent
from solar_jax.errors import UserError

Batch = dict[str, jax.Array]  # a Row's arrays with a leading B
_FOREVER = 1 << 40  # batches


def addresses(corpus: Corpus, seed: int) -> grain.MapDataset:
    """Returns an endless dataset of (source, row of it): each source reshuffled on every pass, mixed by tokens."""
    parts = [
        grain.MapDataset.range(len(rows)).seed(seed + i).shuffle().repeat(None)
        for i, (_, rows) in enumerate(corpus.train)
    ]
    return grain.MapDataset.source(Mixture(parts, _shares(corpus)))


def _shares(corpus: Corpus) -> list[int]:
    """The sources' shares of the rows. Records are read equally often, times their weight; of text, tokens count."""
    a_row = [rows.tokens / len(rows) if source.kind == "text" else 1 / len(rows) for source, rows in corpus.train]
    return row_shares([source.weight for source, _ in corpus.train], a_row)


def training_rows(corpus: Corpus, seed: int, known: LogProbs | None = None) -> grain.MapDataset:
    """Returns the dataset of the rows at `addresses`; `known` as in `row_with`."""
    return addresses(corpus, seed).map(_Load([rows for _, rows in corpus.train], known))


@dataclasses.dataclass(frozen=True)
class _Load:
    sources: Sequence[AnyRows]
    known: LogProbs | None

    def __call__(self, address: tuple[int, int]) -> Row:
        source, row = address
        return row_with(self.sources[source], row, self.known)


def batch_documents(corpus: Corpus, seed: int, first_row: int, size: int) -> list[str]:
    """Returns the ids, without duplicates, of the documents in the global batch of `size` rows from `first_row` on."""
    places: Any = addresses(corpus, seed)
    found: dict[str, None] = {}
    for i in range(first_row, first_row + size):
        source, row = places[i]
        found |= dict.fromkeys(corpus.train[source][1].documents(row))
    return list(found)


def passes(corpus: Corpus, rows: int, *, resumes: bool = False) -> list[float]:
    """Returns the number of passes over each source in a run of `rows` rows.

    Args:
      corpus: the sources.
      rows: of the run.
      resumes: whether the run began before, perhaps when nothing but a source's own `epochs` bounded the passes.

    Raises:
      UserError: a source would be read more often than its `epochs` allow.
    """
    found = []
    for (source, has), needed in zip(corpus.train, rows_of(_shares(corpus), rows), strict=True):
        found.append(needed / len(has))
        if needed > source.epochs * len(has) and not (resumes and source.epochs == MOST_PASSES):
            raise UserError(
                f"config.data.sources: {source.path} has {len(has):,} rows and may be read {source.epochs:g} times, "
                f"but a run of {rows:,} rows reads {needed:,} of it, {found[-1]:.2f} times; give it a smaller weight "
                f"or allow more ({source.path}?epochs=N), add text, or train fewer steps."
            )
    return found


class Feed:
    """Consecutive global batches of `size` rows from a given row on, made in this process or by worker processes.

    The batches are the same for any number of workers; each process makes only the rows of its own devices.

    Args:
      rows: from `training_rows`.
      first_row: number of rows before the first batch.
      size: B.
      padded: rows per batch, at least B; those after B are copies with weight 0, which change no sum.
      sharding: of the rows.
      workers: worker processes; 0 makes batches in the calling thread.
    """

    def __init__(
        self, rows: grain.MapDataset, first_row: int, size: int, padded: int, sharding: jax.sharding.Sharding,
        workers: int = 0,
    ):  # fmt: skip
        self._local, self._padded, self._sharding = _local_rows(padded, sharding), padded, sharding
        self._batches = _Batches(rows, first_row, size, self._local)
        self._next, self._made = 0, None
        if workers:
            dataset = grain.MapDataset.source(self._batches).to_iter_dataset(
                grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
            )
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            self._made = iter(dataset.mp_prefetch(options, worker_init_fn=_as_worker))

    def __call__(self, k: int) -> Batch:
        """Returns batch k, counted from 0, as arrays [padded, T]; with worker processes, only in order."""
        if self._made is None:
            return _placed(self._batches[k], self._local, self._padded, self._sharding)
        assert k == self._next, f"batch {k} was requested after {self._next - 1}"
        self._next += 1
        return _placed(next(self._made), self._local, self._padded, self._sharding)

    def close(self) -> None:
        """Ends the worker processes."""
        if self._made is not None:
            self._made.close()


def _as_worker(index: int, count: int) -> None:
    """Initialises a worker process: it exits when the run ends, however that happens, and leaves Ctrl-C to the run."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def training_batch(
    rows: grain.MapDataset, first_row: int, size: int, padded: int, sharding: jax.sharding.Sharding
) -> Batch:
    """Returns the global batch of rows `first_row` to `first_row` + B; each device reads its own; see `Feed`."""
    return Feed(rows, first_row, size, padded, sharding)(0)


def heldout_batches(rows: list[Row], size: int, sharding: jax.sharding.Sharding) -> list[Batch]:
    """Returns all held-out rows in batches [size, T]; the last is padded with rows of weight 0."""
    padded, local = rows + [_filler(rows[0])] * (-len(rows) % size), _local_rows(size, sharding)
    return [
        _placed(_stacked([padded[k + i] for i in local]), local, size, sharding) for k in range(0, len(padded), size)
    ]


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Local rows of each batch, by batch number: the dataset that worker processes receive and read."""

    rows: grain.MapDataset
    first_row: int
    size: int
    local: Sequence[int]  # indices within a batch of the rows to make

    def __len__(self) -> int:
        return _FOREVER

    def __getitem__(self, index: SupportsIndex) -> Row:
        """Returns arrays [local, T]."""
        begin = self.first_row + int(index) * self.size
        real: list[Any] = [self.rows[begin + i] for i in self.local if i < self.size]
        if len(real) < len(self.local):
            last: Any = real[-1] if real else self.rows[begin + self.size - 1]
            real += [_filler(last)] * (len(self.local) - len(real))
        return _stacked(real)


def _filler(row: Row) -> Row:
    return row | {"weights": np.zeros_like(row["weights"])}


def _stacked(rows: list[Row]) -> Row:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _local_rows(size: int, sharding: jax.sharding.Sharding) -> list[int]:
    """Returns the indices of a batch's rows that devices of this process hold, ascending."""
    found: Any = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({i for index in found for i in range(size)[index[0]]})


def _placed(rows: Row, local: list[int], size: int, sharding: jax.sharding.Sharding) -> Batch:
    """Builds the global arrays [size, T] of a batch from its `local` rows [local, T], sharded by `sharding`."""
    at = {row: k for k, row in enumerate(local)}

    def array(value: np.ndarray) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            return value[[at[i] for i in range(size)[index[0]]]][:, *index[1:]]  # a copy: a worker may own the memory

        return jax.make_array_from_callback((size, *value.shape[1:]), sharding, piece)

    return {name: array(value) for name, value in rows.items()}
