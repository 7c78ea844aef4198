"""Grouped-query attention as plain array operations, for any device and length."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from solar_jax.model.rope import apply_rope

# (q [B, T, N, H] and k [B, S, K, H] before rotation, v [B, S, K, H], cosines and sines [B, T, H/2], what a query may
# see in the form that it takes) -> [B, T, N, H]
Attend = Callable[[jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array], jax.Array | None], jax.Array]

SAVED = "attention"  # the name under which a remat policy keeps the output, and a kernel's logarithms of softmax sums


def attention_mask(length: int, segment_ids: jax.Array | None, sliding_window: int) -> jax.Array:
    """Which key each query may see.

    Args:
      length: T.
      segment_ids: [B, T], the document that a token belongs to, or None where a row is one document.
      sliding_window: keys that a query sees, itself included (HF `sliding_window`); 0 for all before it.

    Returns:
      Booleans [B or 1, T, S].
    """
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    mask = key <= query
    if sliding_window:
        mask &= query - key < sliding_window
    mask = mask[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, the softmax in float32.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H]; query head n uses key head n // (N / K).
      v: [B, S, K, H].
      mask: [B or 1, T, S], as `attention_mask` makes it; None: every query sees every key.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
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
