"""The compiled programs of decoding: a prompt into a row of the cache, and one token of every row."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from solar_jax.config import ModelConfig
from solar_jax.decoding.forward import Cache, Layout, cached_hidden, projected, with_row, written
from solar_jax.decoding.logprobs import LogProbs, prompt_log_probs, token_log_probs
from solar_jax.decoding.sampling import Settings, next_tokens
from solar_jax.model.llama import unconstrained
from solar_jax.model.shapes import Params
from solar_jax.parallel import rules
from solar_jax.parallel.collectives import constrain_on

Step = Callable[..., tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Programs:
    """Functions that are compiled for each bucket; cache and seen tokens are donated."""

    # (params, cache, seen, tokens [P], length, row, settings, plain=, scored=, whole=)
    # -> token [1], cache, seen, its log-probability if `scored`, and those of the prompt if `whole`
    prefill: Step
    # (params, cache, seen, tokens [B], positions [B], settings, steps [B], plain=, scored=)
    # -> tokens [B], cache, seen, their log-probabilities if `scored`
    decode: Step
    unseen: Callable[[], jax.Array]  # creates bool [B, V], the tokens of each row so far
    placed: Callable[[Any], Any]  # lays an array of the host on all devices, of all processes


def make_programs(cfg: ModelConfig, rows: int, compute_dtype: Any, layout: Layout) -> Programs:
    """Makes the programs of B = `rows` rows.

    Args:
      cfg: the architecture.
      rows: a multiple of what the mesh's axes of the batch divide.
      compute_dtype: dtype of matmuls, activations and cache.
      layout: of the cache.
    """
    mesh = layout.mesh
    whole = rules.replicated(mesh) if mesh else None
    made = (whole, NamedSharding(mesh, layout.cache_spec) if mesh else None, whole, whole)
    compiled = functools.partial(jax.jit, donate_argnums=(1, 2))

    def forward(over: Any) -> Any:
        constrain = constrain_on(mesh, rules.ACTIVATIONS | {"B": None, "T": over}) if mesh else unconstrained
        return functools.partial(cached_hidden, cfg, compute_dtype=compute_dtype, constrain=constrain, layout=layout)

    of_prompt, of_rows = forward(None), forward(rules.BATCH_AXES)

    def prefill(
        params: Params, cache: Cache, seen: jax.Array, tokens: jax.Array, length: jax.Array, row: jax.Array,
        settings: Settings, *, plain: bool, scored: bool = False, whole: bool = False,
    ) -> tuple[jax.Array, Cache, jax.Array, LogProbs | None, LogProbs | None]:  # fmt: skip
        """Fills a row of the cache with a prompt [P], of which `length` tokens are real; draws the next token."""
        positions = jnp.arange(len(tokens))
        x, head, new = of_prompt(params, tokens, positions, None)
        cache = with_row(cache, new, row[None], layout)
        logits = projected(jax.lax.dynamic_slice_in_dim(x, length - 1, 1), head, layout)
        mine = jnp.zeros((seen.shape[1],), bool).at[tokens].max(positions < length)
        found = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if not plain:
            found = next_tokens(logits, settings, mine[None], jnp.zeros(1, jnp.int32))
        seen = seen.at[row].set(mine.at[found[0]].set(True))
        scores = token_log_probs(logits, found) if scored else None
        project = functools.partial(projected, head=head, layout=layout)
        return found, cache, seen, scores, prompt_log_probs(x, project, tokens) if whole else None

    def decode(
        params: Params, cache: Cache, seen: jax.Array, tokens: jax.Array, positions: jax.Array, settings: Settings,
        steps: jax.Array, *, plain: bool, scored: bool = False,
    ) -> tuple[jax.Array, Cache, jax.Array, LogProbs | None]:  # fmt: skip
        """Feeds one token of every row and draws the next."""
        x, head, new = of_rows(params, tokens, positions, cache)
        cache = written(cache, new, positions, layout)
        logits = projected(x, head, layout)
        found = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if not plain:
            found = next_tokens(logits, settings, seen, steps)
            seen = seen.at[jnp.arange(len(found)), found].set(True)
        return found, cache, seen, token_log_probs(logits, found) if scored else None

    def placed(x: Any) -> Any:
        if whole is None or jax.process_count() == 1:
            return x
        return jax.tree.map(lambda a: jax.make_array_from_callback(np.shape(a), whole, np.asarray(a).__getitem__), x)

    unseen = jax.jit(lambda: jnp.zeros((rows, cfg.vocab_size), bool), out_shardings=whole)
    return Programs(
        compiled(prefill, static_argnames=("plain", "scored", "whole"), out_shardings=(*made, whole)),
        compiled(decode, static_argnames=("plain", "scored"), out_shardings=made), unseen, placed,
    )  # fmt: skip
