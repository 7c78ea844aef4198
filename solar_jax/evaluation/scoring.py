"""Log-probabilities of tokens in given contexts, on the devices, with common beginnings computed once."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from solar_jax.config import ModelConfig
from solar_jax.decoding.engine import BUCKETS, bucket
from solar_jax.evaluation.trie import NOT_SEEN, Query, TrieRow, pack_queries
from solar_jax.model.attention import rotated_attention
from solar_jax.model.llama import hidden, unembed
from solar_jax.model.shapes import Params

BUDGET = 1024  # tokens of a row
_PART = 64  # places whose logits are held at a time


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

    def __init__(self, cfg: ModelConfig, params: Params, *, compute_dtype: Any = jnp.float32, budget: int = BUDGET):
        self.cfg, self.budget, self.counts = cfg, budget, Counts()
        self._params = params
        self._score = jax.jit(functools.partial(_score, cfg, compute_dtype=compute_dtype))

    def scores(self, queries: Sequence[Query], *, share: bool = True) -> Iterator[tuple[int, Scored]]:
        """Yields each query's number and score, row by row.

        Args:
          queries: at most the model's context long.
          share: compute common beginnings once.
        """
        for row in pack_queries(queries, self.budget, share=share):
            wanted = [(place, target) for number, asked in row.ask.items()
                      for place, target in zip(asked, queries[number].targets, strict=True)]  # fmt: skip
            self.counts.asked += sum(len(queries[number].tokens) for number in row.ask)
            self.counts.computed += len(row.tokens)
            log_probs, greedy = self._run(row, wanted)
            at = 0
            for number, asked in row.ask.items():
                stop = at + len(asked)
                yield number, Scored(log_probs[at:stop], greedy[at:stop])
                at = stop

    def _run(self, row: TrieRow, wanted: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        T, M, W = (bucket(n, BUCKETS[-1]) for n in (len(row.tokens), len(row.attached), max(_PART, len(wanted))))
        self.counts.padding += T - len(row.tokens)
        limits = np.full((M, M), NOT_SEEN, np.int32)
        limits[: len(row.attached), : len(row.attached)] = row.limits()
        places, targets = (_padded(column, W) for column in zip(*wanted, strict=True))
        log_probs, greedy = self._score(
            self._params, _padded(row.tokens, T), _padded(row.positions, T), _padded(row.chains, T, M - 1), limits,
            places, targets,
        )  # fmt: skip
        return np.asarray(log_probs)[: len(wanted)], np.asarray(greedy)[: len(wanted)]


def _padded(values: Sequence[int], size: int, fill: int = 0) -> np.ndarray:
    out = np.full(size, fill, np.int32)
    out[: len(values)] = values
    return out


def _score(
    cfg: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, chains: jax.Array, limits: jax.Array,
    places: jax.Array, targets: jax.Array, *, compute_dtype: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Scores one row.

    Args:
      cfg, params: the model.
      tokens, positions, chains: [T].
      limits: [M, M] from `TrieRow.limits`.
      places, targets: [W] place of a token, and the token that is expected after it; W is a multiple of `_PART`.
      compute_dtype: dtype of matmuls and activations.

    Returns:
      Log-probabilities float32 [W], and whether the target is the most likely token, bool [W].
    """
    at = jnp.arange(len(tokens))
    seen = at[None, :] <= jnp.minimum(at[:, None], limits[chains][:, chains])
    if cfg.sliding_window:
        seen &= positions[:, None] - positions[None, :] < cfg.sliding_window
    x, head = hidden(
        cfg, params, tokens[None], positions[None], seen[None], compute_dtype=compute_dtype, attend=rotated_attention
    )

    def one(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        at, target = part
        found = unembed(x[0, at], head)
        chosen = jnp.take_along_axis(found, target[:, None], axis=-1)[:, 0]
        return None, (chosen - jax.nn.logsumexp(found, axis=-1), jnp.argmax(found, axis=-1) == target)

    # A part's logits are held at a time. A place with several targets is computed for each.
    _, (log_probs, greedy) = jax.lax.scan(one, None, (places.reshape(-1, _PART), targets.reshape(-1, _PART)))
    return log_probs.reshape(-1), greedy.reshape(-1)
