"""Grouped-query attention on TPU via jax's splash kernels, which stream blocks of rows of any length."""

import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from solar_jax.model.attention import SAVED, WHOLE, Shard, chunk_order
from solar_jax.model.flash_blocks import LANES, block_size
from solar_jax.model.rope import apply_rope

# Queries and keys per block. Larger blocks mean fewer partial sums of dq and fewer passes over k and v; the bound is
# the VMEM of every supported chip.
BLOCK = {"forward": 1024, "backward": 2048, "compute": 512}


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids: jax.Array | None, *,
    sliding_window: int, interpret: bool, shard: Shard = WHOLE,
) -> jax.Array:  # fmt: skip
    """Causal attention without materialising [T, S] scores, with a fused backward kernel.

    Args:
      q: [B, T, N, H] before RoPE, on one device; T, or T / 2 with a shard, must be a multiple of `flash_blocks.LANES`.
      k: [B, T, K, H] before RoPE.
      v: [B, T, K, H].
      rope: cosines and sines, float32 [B, T, H/2], from `model.rope.rope_angles`.
      segment_ids: [B, S], document index of each token of the full row; None if every row is one document.
      sliding_window: keys each query sees, including itself; 0 for all earlier ones.
      interpret: run the kernels in interpret mode, for machines without a TPU.
      shard: selects the queries and gathers all keys and values.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    # Imported lazily: it takes a second, which CPU runs need not spend.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N, H = q.shape[1:]
    S = T * shard.count
    mask = masks.LocalMask((S, S), (sliding_window - 1, 0), 0) if sliding_window else masks.CausalMask((S, S))
    if shard.count > 1:
        mask.q_sequence = mask.q_sequence.reshape(2 * shard.count, -1)[chunk_order(shard.count)].reshape(S)
    smaller = -(-H // LANES) * (2 if q.dtype == jnp.float32 else 1)  # where a head takes several vectors, or wide ones
    forward, backward, compute = (block_size(S, BLOCK[name] // smaller) for name in ("forward", "backward", "compute"))
    queries = forward if shard.count == 1 else block_size(T // 2, forward)  # within one chunk
    kernel: Callable[..., Any] = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(
            block_q=queries, block_kv=forward, block_kv_compute=block_size(forward, compute),
            block_q_dkv=queries, block_kv_dkv=backward, block_kv_dkv_compute=block_size(backward, compute),
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=shard.count,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )  # fmt: skip
    if shard.count > 1:  # slice this shard's part out of the kernel's per-query data

        def part(x: jax.Array) -> jax.Array:
            axis = 1 if x.ndim == 3 else 0  # [1, query blocks, key blocks], or query positions [S]
            size = x.shape[axis] // shard.count
            return jax.lax.dynamic_slice_in_dim(x, shard.index * size, size, axis)

        kernel = jax.tree.map(part, kernel)
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)  # the kernel does not scale
    # The kernel takes heads before tokens; XLA has the projections write that layout directly.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    k, v = shard.whole(k, 2), shard.whole(v, 2)
    run = jax.vmap(kernel)
    if q.dtype == jnp.float32:
        run = _in_full(run)
    if segment_ids is None:
        out = run(q, k, v)
    else:
        out = run(q, k, v, splash.SegmentIds(shard.own(segment_ids, 1), segment_ids))
    return jnp.swapaxes(typing.cast(jax.Array, out), 1, 2)


def _in_full(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Has a kernel multiply float32 matrices in full, where its default is one pass in bfloat16.

    Its backward kernel is traced later than its forward one, so each is given the precision by itself.
    """
    in_full = functools.partial(jax.default_matmul_precision, "highest")

    @jax.custom_vjp
    def run(*inputs: Any) -> Any:
        with in_full():
            return kernel(*inputs)

    def forward(*inputs: Any) -> tuple[Any, Any]:
        with in_full():
            return jax.vjp(kernel, *inputs)

    def backward(pull_back: Any, cotangent: Any) -> Any:
        with in_full():
            return pull_back(cotangent)

    run.defvjp(forward, backward)
    return run
