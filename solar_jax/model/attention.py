"""Grouped-query attention: plain array operations for any device and length, and splash kernels for TPUs."""

import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# (q [B, T, N, H], k [B, S, K, H], v [B, S, K, H], what a query may see in the form that it takes) -> [B, T, N, H]
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]

SAVED = "attention"  # the name under which a remat policy keeps the output, and a kernel's softmax sums

# Splash: queries and keys a block. Larger blocks mean fewer partial sums of dq and fewer passes over k and v;
# what fits the vector memory of every supported chip is the bound.
BLOCK = {"forward": 1024, "backward": 2048, "compute": 512}
LANES = 128  # a TPU vector's; T has to be a multiple for the kernel


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


def _named(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Queries, keys and values under the names by which a remat policy keeps them."""
    return tuple(checkpoint_name(x, name) for x, name in zip(arrays, "qkv", strict=True))


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
    q, k, v = _named(q, k, v)
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores *= H**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=precision).reshape(B, T, N, H)
    return checkpoint_name(out, SAVED)


def block_size(length: int, largest: int) -> int:
    """The largest multiple of `LANES` that divides T and is at most `largest`."""
    return max(b for b in range(LANES, min(length, largest) + 1, LANES) if length % b == 0)


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, sliding_window: int, interpret: bool
) -> jax.Array:
    """`attention` without its [T, S] scores in memory: a causal kernel, its backward pass in one more.

    Args:
      q: [B, T, N, H], T a multiple of `LANES`, the rows of one device.
      k: [B, T, K, H].
      v: [B, T, K, H].
      segment_ids: [B, T], the document that a token belongs to, or None where a row is one document.
      sliding_window: keys that a query sees, itself included; 0 for all before it.
      interpret: run the kernels as array operations, where there is no TPU.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    # Here, since the import takes a second that no CPU run needs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N, H = q.shape[1:]
    mask = masks.LocalMask((T, T), (sliding_window - 1, 0), 0) if sliding_window else masks.CausalMask((T, T))
    forward, backward, compute = (block_size(T, BLOCK[name]) for name in ("forward", "backward", "compute"))
    kernel: Callable[..., Any] = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(
            block_q=forward, block_kv=forward, block_kv_compute=block_size(forward, compute),
            block_q_dkv=forward, block_kv_dkv=backward, block_kv_dkv_compute=block_size(backward, compute),
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )  # fmt: skip
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)  # the kernel does not scale
    # The kernel takes heads before tokens; XLA lets the projections write that order.
    q, k, v = _named(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))
    if segment_ids is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids, segment_ids))
    return jnp.swapaxes(typing.cast(jax.Array, out), 1, 2)
