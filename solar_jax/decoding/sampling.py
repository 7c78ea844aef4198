"""Choice of the next token from logits, on the device: every row with its own settings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from solar_jax.errors import UserError

_NEVER = -jnp.inf


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a row's tokens are chosen, with transformers' names and meanings."""

    temperature: float = 0.0  # 0: always the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0), ("top_k", 0, 1 << 30), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0),
            ("repetition_penalty", 1e-3, 1e3), ("seed", 0, 2**63 - 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UserError(f"{name} must be a number in [{low:g}, {high:g}], found {value!r}.")
        if self.top_p == 0:
            raise UserError("top_p must be above 0.")

    @property
    def is_plain(self) -> bool:
        """True if the most likely token is taken as the model says it."""
        return self.temperature == 0 and self.repetition_penalty == 1


Settings = dict[str, Any]  # arrays [B]


def settings_of(rows: Sequence[Sampling]) -> Settings:
    """Lays out the settings of B rows as arrays."""
    floats = ("temperature", "top_p", "min_p", "repetition_penalty")
    found: Settings = {name: np.array([getattr(row, name) for row in rows], np.float32) for name in floats}
    found["top_k"] = np.array([row.top_k for row in rows], np.int32)
    halves = np.array([[row.seed >> 32, row.seed & 0xFFFFFFFF] for row in rows], np.uint32)
    return found | {"seed": halves}


def processed(logits: jax.Array, settings: Settings, seen: jax.Array) -> jax.Array:
    """Applies penalty, temperature, top-k, top-p and min-p, in transformers' order; dropped tokens become -inf.

    Args:
      logits: [B, V] float32.
      settings: of B rows; a temperature of 0 counts as 1.
      seen: [B, V] bool, tokens of the prompt and of what was generated.
    """
    penalty = settings["repetition_penalty"][:, None]
    logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    temperature = jnp.where(settings["temperature"] > 0, settings["temperature"], 1.0)
    logits = logits / temperature[:, None]
    V = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1)  # ascending
    k = jnp.where(settings["top_k"] > 0, jnp.minimum(settings["top_k"], V), V)
    kth = jnp.take_along_axis(ordered, (V - k)[:, None], axis=-1)
    logits = jnp.where(logits < kth, _NEVER, logits)
    ordered = jnp.where(ordered < kth, _NEVER, ordered)
    # Top-p drops the least likely tokens whose probabilities add up to at most 1 - p.
    order = jnp.argsort(logits, axis=-1, stable=True)
    below = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    dropped = below <= 1.0 - settings["top_p"][:, None]
    dropped = dropped.at[:, -1].set(False) & (settings["top_p"] < 1)[:, None]
    rows = jnp.arange(len(logits))[:, None]
    logits = jnp.where(jnp.zeros_like(dropped).at[rows, order].set(dropped), _NEVER, logits)
    probabilities = jax.nn.softmax(logits, axis=-1)
    least = settings["min_p"][:, None] * probabilities.max(axis=-1, keepdims=True)
    return jnp.where(probabilities < least, _NEVER, logits)


def next_tokens(logits: jax.Array, settings: Settings, seen: jax.Array, steps: jax.Array) -> jax.Array:
    """Draws the next token of every row, [B] int32.

    Args:
      logits: [B, V] float32.
      settings: of B rows.
      seen: [B, V] bool.
      steps: [B] how many tokens a row has generated; with its seed, this decides the draw, whatever its neighbours do.
    """
    found = processed(logits, settings, seen)

    def draw(row: jax.Array, seed: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), step)
        return jax.random.categorical(key, row)

    drawn = jax.vmap(draw)(found, settings["seed"], steps)
    return jnp.where(settings["temperature"] > 0, drawn, jnp.argmax(found, axis=-1)).astype(jnp.int32)
