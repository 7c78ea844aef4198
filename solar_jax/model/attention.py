"""Grouped-query attention as plain array operations, for any device and length."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from solar_jax.model.rope import apply_rope

# (q [B, T, N, H] and k [B, S, K, H] before rotation, v [B, S, K, H], cosines and sines [B, T, H/2], what a query may
# see in the form that it takes) -> [B, T, N, H]
Attend = Callable[[jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array], jax.Array | None], jax.Array]

SAVED = "attention"  # the name under which a remat policy keeps the output, and a kernel's logarithms of softmax sums


def chunk_order(shards: int) -> list[int]:
    """Which of a row's 2 x shards chunks each shard has, two a shard, shard after shard.

    One is as far from the row's start as the other from its end: the queries of every shard then see, under a causal
    mask, equally many keys.
    """
    return [chunk for i in range(shards) for chunk in (i, 2 * shards - 1 - i)]


@dataclasses.dataclass(frozen=True)
class Shard:
    """The tokens of one device, of rows that are split over `count` of them by `chunk_order`."""

    count: int = 1
    index: jax.Array | int = 0  # which of them
    all_gather: Callable[[jax.Array], jax.Array] | None = None  # [...] -> [count, ...], every device's

    def own(self, x: jax.Array, axis: int) -> jax.Array:
        """Of whole rows along `axis`, in the order of the text, this device's tokens."""
        if self.count == 1:
            return x
        size = x.shape[axis] // (2 * self.count)
        chunks = (self.index, 2 * self.count - 1 - self.index)
        return jnp.concatenate([jax.lax.dynamic_slice_in_dim(x, i * size, size, axis) for i in chunks], axis)

    def whole(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of `own`: whole rows along `axis`, from what every device has."""
        if self.all_gather is None:
            return x
        halves = x.reshape(*x.shape[:axis], 2, x.shape[axis] // 2, *x.shape[axis + 1 :])
        front, back = jnp.split(jnp.moveaxis(self.all_gather(halves), axis + 1, 0), 2)
        chunks = jnp.concatenate((front[0], back[0, ::-1]))
        return jnp.moveaxis(chunks, 0, axis).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


WHOLE = Shard()  # every token is on one device


def attention_mask(length: int, segment_ids: jax.Array | None, sliding_window: int, shard: Shard = WHOLE) -> jax.Array:
    """Which key each query may see.

    Args:
      length: S, and T where one device has all queries.
      segment_ids: [B, S], the document that a token belongs to, or None where a row is one document.
      sliding_window: keys that a query sees, itself included (HF `sliding_window`); 0 for all before it.
      shard: which queries.

    Returns:
      Booleans [B or 1, T, S].
    """
    query, key = shard.own(jnp.arange(length), 0)[:, None], jnp.arange(length)[None, :]
    mask = key <= query
    if sliding_window:
        mask &= query - key < sliding_window
    mask = mask[None]
    if segment_ids is not None:
        mask = mask & (shard.own(segment_ids, 1)[:, :, None] == segment_ids[:, None, :])
    return mask


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, shard: Shard = WHOLE) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, the softmax in float32.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H]; query head n uses key head n // (N / K). Of a shard, its own: S = T.
      v: [B, S, K, H].
      mask: [B or 1, T, S], as `attention_mask` makes it; None: every query sees every key.
      shard: whose keys and values are gathered from all.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    k, v = shard.whole(k, 1), shard.whole(v, 1)
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores *= H**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=precision).reshape(B, T, N, H)
    return checkpoint_name(out, SAVED)


def rotated_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array | None
) -> jax.Array:
    """`attention` of queries and keys that are rotated first; an `Attend`."""
    return attention(apply_rope(q, rope), apply_rope(k, rope), v, mask)


def sharded_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids: jax.Array | None, *,
    sliding_window: int, shard: Shard,
) -> jax.Array:  # fmt: skip
    """`rotated_attention` of a shard's queries, its mask made of the whole rows' segment ids [B, S]."""
    mask = attention_mask(q.shape[1] * shard.count, segment_ids, sliding_window, shard)
    return attention(apply_rope(q, rope), apply_rope(k, rope), v, mask, shard)
