"""Log-probabilities of tokens in given contexts, on the devices, with common beginnings computed once."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from solar_jax.config import ModelConfig
from solar_jax.evaluation.store import Scores, Store, key_of_row
from solar_jax.evaluation.trie import Query, TrieRow, pack_queries
from solar_jax.model.attention import rotated_attention
from solar_jax.model.llama import Constrain, hidden, unconstrained, unembed
from solar_jax.model.shapes import Params
from solar_jax.parallel import rules
from solar_jax.parallel.collectives import constrain_on
from solar_jax.parallel.mesh import axis_size

BUDGET = 1024  # tokens of a row
_PART = 64  # places whose logits are held at a time
_SIZES = 4  # a row's length is rounded up to a multiple of the budget's so many-th part
# Whole rows lie on one device; rows are split over all axes of the batch.
_ACTIVATIONS = rules.ACTIVATIONS | {"B": rules.BATCH_AXES, "T": None}


@dataclasses.dataclass(frozen=True)
class Scored:
    """Log-probabilities of a query's targets."""

    log_probs: np.ndarray  # float32, of each target
    greedy: np.ndarray  # bool, whether it was the most likely token

    @property
    def total(self) -> float:
        return float(np.sum(self.log_probs, dtype=np.float64))

    @property
    def all_greedy(self) -> bool:
        return bool(self.greedy.all())


@dataclasses.dataclass
class Counts:
    """Tokens that were asked for, and those that were computed."""

    asked: int = 0
    computed: int = 0
    padding: int = 0

    def reset(self) -> None:
        self.asked = self.computed = self.padding = 0


class Scorer:
    """A model that scores queries."""

    def __init__(
        self, cfg: ModelConfig, params: Params, *, mesh: Mesh | None = None, compute_dtype: Any = jnp.float32,
        budget: int = BUDGET, prepare: Callable[[Params], Params] = lambda params: params,
    ):  # fmt: skip
        """Prepares a model.

        Args:
          cfg: the architecture.
          params: the state, on its devices.
          mesh: of the state; rows are split over its axes of the batch. None: one device.
          compute_dtype: dtype of matmuls and activations.
          budget: tokens of a row.
          prepare: makes of the state what `model.llama.hidden` takes.
        """
        self.cfg, self.budget, self.counts = cfg, budget, Counts()
        self.params, self._mesh = params, mesh
        self._rows = axis_size(mesh, *rules.BATCH_AXES) if mesh else 1
        constrain = constrain_on(mesh, _ACTIVATIONS) if mesh else unconstrained
        score = functools.partial(_score, cfg, compute_dtype=compute_dtype, constrain=constrain, prepare=prepare)
        self._score = jax.jit(score, out_shardings=rules.replicated(mesh) if mesh else None)

    def scores(
        self, queries: Sequence[Query], *, share: bool = True, store: Store | None = None
    ) -> Iterator[tuple[int, Scored]]:
        """Yields each query's number and score, row by row.

        Args:
          queries: at most the model's context long.
          share: compute common beginnings once.
          store: rows that it has are not computed again.
        """
        rows = pack_queries(queries, self.budget, share=share)
        groups = (self._dispatched(group, queries, store) for group in itertools.batched(rows, self._rows))
        for group, scores in one_ahead(groups):
            for row, (log_probs, greedy) in zip(group, scores(), strict=True):
                at = 0
                for number, places in row.ask.items():
                    stop = at + len(places)
                    yield number, Scored(log_probs[at:stop], greedy[at:stop])
                    at = stop

    def _dispatched(
        self, group: Sequence[TrieRow], queries: Sequence[Query], store: Store | None
    ) -> tuple[Sequence[TrieRow], Callable[[], list[Scores]]]:
        """Begins to score rows, unless all are known; returns them with a function that waits for their scores."""
        T = self._size(max(len(row.tokens) for row in group))
        wanted = [_wanted(row, queries) for row in group]
        self.counts.asked += sum(len(queries[number].tokens) for row in group for number in row.ask)
        self.counts.computed += sum(len(row.tokens) for row in group)
        self.counts.padding += T * self._rows - sum(len(row.tokens) for row in group)
        keys = [key_of_row(row, asked) for row, asked in zip(group, wanted, strict=True)] if store else []
        known = [found for key in keys if store and (found := store.scores(key)) is not None]
        if len(known) == len(group):
            return group, lambda: known
        arrays = self._run(group, wanted, T)

        def fetched() -> list[Scores]:
            log_probs, greedy = (np.asarray(x) for x in arrays)
            found = [(log_probs[i, : len(asked)], greedy[i, : len(asked)]) for i, asked in enumerate(wanted)]
            for key, scores in zip(keys, found, strict=False):
                if store:
                    store.add_scores(key, scores)
            return found

        return group, fetched

    def _size(self, length: int) -> int:
        """T, one of few, so that few programs are compiled."""
        step = max(1, self.budget // _SIZES)
        return -(-length // step) * step

    def _run(
        self, group: Sequence[TrieRow], wanted: list[list[tuple[int, int]]], T: int
    ) -> tuple[jax.Array, jax.Array]:
        """Dispatches rows of T tokens to the devices."""
        W = -(-max(T, *map(len, wanted)) // _PART) * _PART
        rows = [*group, *([TrieRow()] * (self._rows - len(group)))]
        pairs = np.zeros((2, len(rows), W), np.int32)
        for i, asked in enumerate(wanted):
            pairs[:, i, : len(asked)] = np.array(asked, np.int32).T
        tokens, positions = (
            np.stack([np.pad(np.array(getattr(row, name), np.int32), (0, T - len(row.tokens))) for row in rows])
            for name in ("tokens", "positions")
        )
        mask = np.stack([row.mask(T) for row in rows])
        if window := self.cfg.sliding_window:
            mask &= positions[:, :, None] - positions[:, None, :] < window
        parts = np.int32(max(-(-len(asked) // _PART) for asked in wanted))
        arrays = [self._placed(array) for array in (tokens, positions, mask, pairs[0], pairs[1])]
        return self._score(self.params, *arrays, parts)

    def _placed(self, array: np.ndarray) -> Any:
        if self._mesh is None:
            return array
        return jax.make_array_from_callback(array.shape, rules.batch_sharding(self._mesh), lambda index: array[index])


def one_ahead[T](items: Iterable[T]) -> Iterator[T]:
    """Yields each item once the next one is made, so that the devices have work while the host takes results."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


def _wanted(row: TrieRow, queries: Sequence[Query]) -> list[tuple[int, int]]:
    """(place, expected token) of every target in a row."""
    return [
        (place, target) for number, places in row.ask.items()
        for place, target in zip(places, queries[number].targets, strict=True)
    ]  # fmt: skip


def _score(
    cfg: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, mask: jax.Array, places: jax.Array,
    targets: jax.Array, parts: jax.Array, *, compute_dtype: Any, constrain: Constrain,
    prepare: Callable[[Params], Params],
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Scores rows.

    Args:
      cfg, params: the model.
      tokens, positions: [B, T].
      mask: [B, T, T], the tokens that each token sees.
      places, targets: [B, W] place of a token, and the token that is expected after it; W is a multiple of `_PART`.
      parts: how many times `_PART` of them are asked for.
      compute_dtype: dtype of matmuls and activations.
      constrain: lays out activations and gathered parameters on a mesh.
      prepare: as in `Scorer`.

    Returns:
      Log-probabilities float32 [B, W], and whether the target is the most likely token, bool [B, W].
    """
    x, head = hidden(
        cfg, prepare(params), tokens, positions, mask, compute_dtype=compute_dtype, attend=rotated_attention,
        constrain=constrain,
    )  # fmt: skip
    head = constrain(head, "DV")

    def one(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """A part's logits are held at a time. A place with several targets is computed for each."""
        at, target = (jax.lax.dynamic_slice_in_dim(a, i * _PART, _PART, 1) for a in (places, targets))
        logits = constrain(unembed(jnp.take_along_axis(x, at[:, :, None], axis=1), head), "BTV")
        chosen = jnp.take_along_axis(logits, target[:, :, None], axis=-1)[:, :, 0]
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * _PART, axis=1)
        log_probs = put(found[0], chosen - jax.nn.logsumexp(logits, axis=-1))
        return log_probs, put(found[1], jnp.argmax(logits, axis=-1) == target)

    empty = jnp.zeros(places.shape, jnp.float32), jnp.zeros(places.shape, bool)
    return jax.lax.fori_loop(0, parts, one, empty)
