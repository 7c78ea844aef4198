"""Grouped-query attention in plain array operations, for any device and sequence length."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from solar_jax.model.rope import apply_rope

# (q [B, T, N, H] and k [B, S, K, H] before RoPE, v [B, S, K, H], cosines and sines [B, T, H/2], a mask or segment ids,
# whichever the implementation takes) -> [B, T, N, H]
Attend = Callable[[jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array], jax.Array | None], jax.Array]

SAVED = "attention"  # checkpoint_name of the output and of a kernel's log-sum-exps, for remat policies


def chunk_order(shards: int) -> list[int]:
    """Zigzag order of a row's 2 x shards chunks: two chunks per shard, shard by shard.

    One chunk is as far from the start of the row as the other is from its end, which balances causal attention: the
    queries of every shard see equally many keys.
    """
    return [chunk for i in range(shards) for chunk in (i, 2 * shards - 1 - i)]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One device's share of the tokens when rows are split over `count` devices in `chunk_order`."""

    count: int = 1
    index: jax.Array | int = 0  # this device, 0 to count - 1
    all_gather: Callable[[jax.Array], jax.Array] | None = None  # [...] -> [count, ...], gathered from all devices

    def own(self, x: jax.Array, axis: int) -> jax.Array:
        """Slices this device's tokens out of full rows along `axis`, which are in text order."""
        if self.count == 1:
            return x
        size = x.shape[axis] // (2 * self.count)
        chunks = (self.index, 2 * self.count - 1 - self.index)
        return jnp.concatenate([jax.lax.dynamic_slice_in_dim(x, i * size, size, axis) for i in chunks], axis)

    def whole(self, x: jax.Array, axis: int) -> jax.Array:
        """Inverse of `own`: gathers full rows along `axis`, in text order, from all devices."""
        if self.all_gather is None:
            return x
        halves = x.reshape(*x.shape[:axis], 2, x.shape[axis] // 2, *x.shape[axis + 1 :])
        front, back = jnp.split(jnp.moveaxis(self.all_gather(halves), axis + 1, 0), 2)
        chunks = jnp.concatenate((front[0], back[0, ::-1]))
        return jnp.moveaxis(chunks, 0, axis).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


WHOLE = Shard()  # all tokens on one device


def attention_mask(length: int, segment_ids: jax.Array | None, sliding_window: int, shard: Shard = WHOLE) -> jax.Array:
    """Builds the mask of keys that each query attends to.

    Args:
      length: S, which equals T where one device has all queries.
      segment_ids: [B, S], document index of each token; None if every row is one document.
      sliding_window: keys each query sees, including itself (HF `sliding_window`); 0 for all earlier ones.
      shard: selects the queries.

    Returns:
      bool [B or 1, T, S].
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
    """Computes softmax(q k^T / sqrt(H)) v, with the softmax in float32.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H]; query head n uses key head n // (N / K). With a shard, its own tokens: S = T.
      v: [B, S, K, H].
      mask: [B or 1, T, S] from `attention_mask`; None: every query sees every key.
      shard: this device's tokens; keys and values are gathered from all devices.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    B, T, N, H = q.shape
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    k, v = (shard.whole(x, 1).swapaxes(1, 2) for x in (k, v))
    K, S = k.shape[1:3]
    # Queries of all heads that share a key head are merged into one axis, M, so that each product contracts a single
    # axis, in the backward pass too, and XLA on CPU makes no transposed copies of the operands.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores = jnp.einsum("bkmh,bksh->bkms", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores *= H**-0.5
    if mask is not None:
        by_head = scores.reshape(B, K, N // K, T, S)
        scores = jnp.where(mask[:, None, None], by_head, jnp.finfo(jnp.float32).min).reshape(scores.shape)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkms,bksh->bkmh", weights, v, precision=precision)
    out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return checkpoint_name(out, SAVED)


def rotated_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array | None
) -> jax.Array:
    """`attention` after applying RoPE to queries and keys; an `Attend`."""
    return attention(apply_rope(q, rope), apply_rope(k, rope), v, mask)


def sharded_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids: jax.Array | None, *,
    sliding_window: int, shard: Shard,
) -> jax.Array:  # fmt: skip
    """`rotated_attention` of a shard's queries, with the mask built from the full rows' segment ids [B, S]."""
    mask = attention_mask(q.shape[1] * shard.count, segment_ids, sliding_window, shard)
    return attention(apply_rope(q, rope), apply_rope(k, rope), v, mask, shard)


def library_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids: jax.Array | None, *,
    sliding_window: int, implementation: Literal["xla", "cudnn"],
) -> jax.Array:  # fmt: skip
    """`rotated_attention` via `jax.nn.dot_product_attention`; "cudnn" needs a GPU and never materialises [T, S] scores.

    Args:
      q, k, v, rope: as in `Attend`; 16-bit for cudnn.
      segment_ids: [B, T]; None if every row is one document.
      sliding_window: keys each query sees, including itself; 0 for all earlier ones.
      implementation: backend of the library call.
    """
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    out = jax.nn.dot_product_attention(
        apply_rope(q, rope), apply_rope(k, rope), v, mask=mask, is_causal=True,
        local_window_size=(sliding_window - 1, 0) if sliding_window else None, implementation=implementation,
    )  # fmt: skip
    return checkpoint_name(out, SAVED)


def attention_of_rows(rows: int, mask: jax.Array) -> Attend:
    """`rotated_attention` of `rows` rows concatenated into one; `mask` [B or 1, T, S] is that of the separate rows."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, rope: tuple[jax.Array, jax.Array], _: Any) -> jax.Array:
        q_rows, k_rows, v_rows, cos, sin = (x.reshape(rows, -1, *x.shape[2:]) for x in (q, k, v, *rope))
        return rotated_attention(q_rows, k_rows, v_rows, (cos, sin), mask).reshape(q.shape)

    return attend
