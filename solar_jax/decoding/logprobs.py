"""Log-probabilities beside the tokens: of an answer's tokens as they come, and of a prompt's, a part at a time.

They are those of the model, before temperature, penalty and whatever else shapes the draw.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from solar_jax.decoding.stops import TextStream

MOST_TOP = 20  # the most likely tokens of a place that are kept; one number, so that nothing is compiled again
_PART = 64  # places whose logits are held at a time


class LogProbs(NamedTuple):
    """Log-probabilities of N places; K = `MOST_TOP`, or the vocabulary where that is smaller."""

    chosen: jax.Array  # [N], of the token that stands there
    top: jax.Array  # [N, K], the highest, in descending order
    ids: jax.Array  # [N, K], their tokens


@dataclasses.dataclass(frozen=True)
class TokenLogProb:
    """A token of an answer with its log-probability and the most likely ones in its place."""

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...]  # tokens with theirs, in descending order
    offset: int  # characters of the answer before it


def token_log_probs(logits: jax.Array, chosen: jax.Array) -> LogProbs:
    """Returns log-probabilities of N places.

    The chosen token's is the same number as in `top`, where it is among them.

    Args:
      logits: [N, V] float32.
      chosen: [N] integers.
    """
    total = jax.nn.logsumexp(logits, axis=-1)
    top, ids = jax.lax.top_k(logits, min(MOST_TOP, logits.shape[-1]))
    own = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
    return LogProbs(own - total, top - total[:, None], ids)


def prompt_log_probs(x: jax.Array, project: Callable[[jax.Array], jax.Array], tokens: jax.Array) -> LogProbs:
    """Returns log-probabilities of a prompt's tokens, in place i that of token i + 1; the last place means nothing.

    Args:
      x: [T, D], the final norm's output.
      project: [N, D] -> logits float32 [N, V].
      tokens: [T] integers.
    """
    T = len(tokens)
    parts = -(-T // _PART)
    pad = parts * _PART - T
    x = jnp.pad(x, ((0, pad), (0, 0))).reshape(parts, _PART, -1)
    following = jnp.pad(tokens[1:], (0, pad + 1)).reshape(parts, _PART)

    def one(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, LogProbs]:
        return None, token_log_probs(project(part[0]), part[1])

    _, found = jax.lax.scan(one, None, (x, following))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:T], found)


def on_host(found: LogProbs | None, count: int | None = None) -> LogProbs | None:
    """Fetches the first `count` places, all if None, as numpy arrays."""
    return jax.tree.map(lambda a: np.asarray(a)[:count], found)


def placed(found: LogProbs, place: int, token: int, offset: int) -> TokenLogProb:
    """Returns one place of what was fetched."""
    top = tuple(zip(found.ids[place].tolist(), found.top[place].tolist(), strict=True))
    return TokenLogProb(token, float(found.chosen[place]), top, offset)


def take_released(held: list[TokenLogProb], stream: TextStream, *, final: bool) -> tuple[TokenLogProb, ...]:
    """Takes the tokens whose text is out from `held`; at the end all, but for those that a stop string cut off."""
    count = len(held)
    if stream.stopped or not final:
        count = sum(one.offset < len(stream.text) for one in held)
    out = tuple(held[:count])
    del held[:count]
    return out
