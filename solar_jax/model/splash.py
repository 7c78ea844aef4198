"""Grouped-query attention for TPUs in jax's splash kernels, which stream blocks of rows of any length."""

import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from solar_jax.model.attention import SAVED
from solar_jax.model.flash import block_size
from solar_jax.model.rope import apply_rope

# Queries and keys a block. Larger blocks mean fewer partial sums of dq and fewer passes over k and v; what fits the
# vector memory of every supported chip is the bound.
BLOCK = {"forward": 1024, "backward": 2048, "compute": 512}


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids: jax.Array | None, *,
    sliding_window: int, interpret: bool,
) -> jax.Array:  # fmt: skip
    """Attention without its [T, S] scores in memory: a causal kernel, its backward pass in one more.

    Args:
      q: [B, T, N, H] before rotation, T a multiple of `flash.LANES`, the rows of one device.
      k: [B, T, K, H] before rotation.
      v: [B, T, K, H].
      rope: cosines and sines, float32 [B, T, H/2], as `model.rope.rope_angles` gives them.
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
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)  # the kernel does not scale
    # The kernel takes heads before tokens; XLA lets the projections write that order.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    if segment_ids is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids, segment_ids))
    return jnp.swapaxes(typing.cast(jax.Array, out), 1, 2)
