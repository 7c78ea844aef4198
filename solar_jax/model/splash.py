"""Grouped-query attention for TPUs: jax's splash kernel forward, and one kernel of our own backward.

Splash attention's fused backward pass writes a partial dq for every block of keys and leaves their sum to XLA, which
costs passes over several copies of dq; larger blocks of keys cost work above the diagonal instead. Here a head's dq, dk
and dv are summed in vector memory, so blocks may be small, and blocks that no query of a document sees are passed over.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from solar_jax.model.attention import SAVED

LANES = 128  # a TPU vector's; T has to be a multiple for the kernels
# Queries and keys a block. Forward, larger blocks mean fewer passes over k and v; backward, 5 matmuls of
# 512 x 512 x H are enough between two turns of a loop.
BLOCK = {"forward": 1024, "compute": 512, "backward": 512}
SPLASH_BACKWARD = 2048  # keys a block of splash's own backward kernel, for rows that are too long for ours
MASKED = -1e30  # finite, so that a masked score gives 0 and no NaN
BUFFERS = 2  # of each operand and result: one is moved while the other is used
SCORES = 16 * 2**20  # bytes of vector memory left for blocks of scores and what is made of them


def block_size(length: int, largest: int) -> int:
    """The largest multiple of `LANES` that divides T and is at most `largest`."""
    return max(b for b in range(LANES, min(length, largest) + 1, LANES) if length % b == 0)


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, sliding_window: int,
    vector_memory: int, interpret: bool,
) -> jax.Array:  # fmt: skip
    """`attention` without its [T, S] scores in memory.

    Args:
      q: [B, T, N, H], T a multiple of `LANES`, the rows of one device.
      k: [B, T, K, H].
      v: [B, T, K, H].
      segment_ids: [B, T], the document that a token belongs to, which does not fall along a row; None: a row is one.
      sliding_window: keys that a query sees, itself included; 0 for all before it.
      vector_memory: bytes of a core's; where our backward kernel needs more, splash attention's own runs.
      interpret: run the kernels as array operations, where there is no TPU.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    T, H = q.shape[1], q.shape[3]
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)  # the kernels do not scale
    # The kernels take heads before tokens; XLA lets the projections write that order.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    if segment_ids is None:
        segment_ids = jnp.zeros((q.shape[0], T), jnp.int32)
    if needed_memory(T, H, q.dtype.itemsize) > vector_memory:
        out = _forward(q, k, v, segment_ids, sliding_window, interpret, own_backward=False)
    else:
        out = _attention(q, k, v, segment_ids, sliding_window, interpret)
    return jnp.swapaxes(out, 1, 2)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, sliding_window: int, interpret: bool, *,
    own_backward: bool,
) -> Any:  # fmt: skip
    """Splash attention of [B, N, T, H]; with `own_backward` also the logarithms of its softmax sums [B, N, T]."""
    # Here, since the import takes a second that no CPU run needs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    N, T = q.shape[1:3]
    mask = masks.LocalMask((T, T), (sliding_window - 1, 0), 0) if sliding_window else masks.CausalMask((T, T))
    block, backward = block_size(T, BLOCK["forward"]), block_size(T, SPLASH_BACKWARD)
    kernel: Callable[..., Any] = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block_size(block, BLOCK["compute"]),
            block_q_dkv=block, block_kv_dkv=backward, block_kv_dkv_compute=block_size(backward, BLOCK["compute"]),
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=own_backward,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )  # fmt: skip
    return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids, segment_ids))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, sliding_window: int, interpret: bool
) -> jax.Array:
    return _forward(q, k, v, segment_ids, sliding_window, interpret, own_backward=True)[0]


def _attention_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, sliding_window: int, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, (logsumexp,) = _forward(q, k, v, segment_ids, sliding_window, interpret, own_backward=True)
    out, logsumexp = checkpoint_name(out, SAVED), checkpoint_name(logsumexp, SAVED)
    return out, (q, k, v, segment_ids, out, logsumexp)


def _attention_backward(
    sliding_window: int, interpret: bool, saved: tuple[jax.Array, ...], do: jax.Array
) -> tuple[jax.Array | None, ...]:
    q, k, v, segment_ids, out, logsumexp = saved
    di = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    block = block_size(q.shape[2], BLOCK["backward"])
    grads = splash_backward(
        q, k, v, segment_ids, logsumexp, di, do, block=block, sliding_window=sliding_window, interpret=interpret
    )
    return *grads, None


_attention.defvjp(_attention_forward, _attention_backward)


def needed_memory(length: int, width: int, itemsize: int) -> int:
    """Bytes of vector memory that the backward kernel needs for T = `length`, H = `width`."""
    moved = BUFFERS * 7 * length * width * itemsize  # q, k, v, do and dq, dk, dv
    rows = BUFFERS * (3 * 8 + LANES) * length * 4  # logsumexp, di, segment ids; those of keys down the sublanes
    return moved + rows + 2 * length * width * 4 + SCORES


def first_blocks(segment_ids: jax.Array, block: int, sliding_window: int) -> jax.Array:
    """[B, T] -> int32 [B, T / block]: the first block of keys that any query of a block may see.

    Segment ids do not fall along a row, so the first query's first key is the earliest one.
    """
    T = segment_ids.shape[1]
    starts = segment_ids[:, ::block]  # of each block's first query
    first = jnp.sum(segment_ids[:, None, :] < starts[:, :, None], axis=-1)  # keys of earlier documents
    if sliding_window:
        first = jnp.maximum(first, jnp.arange(0, T, block)[None] - sliding_window + 1)
    return (first // block).astype(jnp.int32)


def _kernel(
    first_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, di_ref, q_segment_ref, k_segment_ref,
    dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum, *, block: int, sliding_window: int, group: int,
):  # fmt: skip
    """One query head. first: [B, T / block]; q, k, v, do, dq, dk, dv: [T, H]; lse, di, q_segment: [1, T].

    k_segment: [T, LANES], the same in all lanes. Sums are float32: dq's [block, H], the others' [T, H].
    """
    from jax.experimental import pallas as pl

    row, head = pl.program_id(0), pl.program_id(2)
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    rows_by_rows = (((1,), (1,)), ((), ()))  # a b^T
    rows_by_columns = (((1,), (0,)), ((), ()))  # a b
    columns_by_columns = (((0,), (0,)), ((), ()))  # a^T b

    @pl.when(head == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def queries(i, _):
        at = pl.ds(i * block, block)
        q, do = q_ref[at, :], do_ref[at, :]
        lse, di, q_segment = lse_ref[:, at], di_ref[:, at], q_segment_ref[:, at]
        dq_sum[...] = jnp.zeros_like(dq_sum)

        def keys(j, _):
            of = pl.ds(j * block, block)
            k, v = k_ref[of, :], v_ref[of, :]
            scores = dot(k, q, rows_by_rows)  # [keys, queries], as all below
            age = (i - j) * block + (
                jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                - jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            )
            seen = (k_segment_ref[of, :1] == q_segment) & (age >= 0)
            if sliding_window:
                seen &= age < sliding_window
            p = jnp.exp(jnp.where(seen, scores, MASKED) - lse)
            dv_sum[of, :] += dot(p.astype(do.dtype), do, rows_by_columns)
            ds = ((dot(v, do, rows_by_rows) - di) * p).astype(q.dtype)
            dk_sum[of, :] += dot(ds, q, rows_by_columns)
            dq_sum[...] += dot(ds, k, columns_by_columns)

        jax.lax.fori_loop(first_ref[row, i], i + 1, keys, None)
        dq_ref[at, :] = dq_sum[...].astype(dq_ref.dtype)

    jax.lax.fori_loop(0, q_ref.shape[0] // block, queries, None)

    @pl.when(head == group - 1)
    def _():
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def splash_backward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, logsumexp: jax.Array, di: jax.Array,
    do: jax.Array, *, block: int, sliding_window: int, interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients of `softmax(q k^T) v` over the keys that are no later, in the same document and window.

    Args:
      q: [B, N, T, H], scaled.
      k: [B, K, T, H].
      v: [B, K, T, H].
      segment_ids: [B, T] integers that do not fall along a row.
      logsumexp: [B, N, T] float32, of each query's scores.
      di: [B, N, T] float32, the sum over H of do and the output.
      do: [B, N, T, H], the output's gradient.
      block: queries and keys a step; divides T.
      sliding_window: keys that a query sees, itself included; 0 for all before it.
      interpret: run as array operations, where there is no TPU.

    Returns:
      dq [B, N, T, H], dk and dv [B, K, T, H], in the dtypes of q, k and v.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    B, N, T, H = q.shape
    K = k.shape[1]
    group = N // K
    per_query = pl.BlockSpec((None, None, T, H), lambda b, kv, g, _: (b, kv * group + g, 0, 0))
    per_key = pl.BlockSpec((None, None, T, H), lambda b, kv, g, _: (b, kv, 0, 0))
    per_score = pl.BlockSpec((None, None, 1, T), lambda b, kv, g, _: (b, kv * group + g, 0, 0))
    q_segment = pl.BlockSpec((None, 1, T), lambda b, kv, g, _: (b, 0, 0))
    k_segment = pl.BlockSpec((None, T, LANES), lambda b, kv, g, _: (b, 0, 0))
    segment_ids = segment_ids.astype(jnp.int32)
    return pl.pallas_call(
        functools.partial(_kernel, block=block, sliding_window=sliding_window, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, group),
            in_specs=[per_query, per_key, per_key, per_query, per_score, per_score, q_segment, k_segment],
            out_specs=[per_query, per_key, per_key],
            scratch_shapes=[
                pltpu.VMEM((block, H), jnp.float32), pltpu.VMEM((T, H), jnp.float32), pltpu.VMEM((T, H), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=needed_memory(T, H, q.dtype.itemsize),
        ),
        name="splash_attention_dkv_fused",
        interpret=interpret,
    )(
        first_blocks(segment_ids, block, sliding_window), q, k, v, do, logsumexp[:, :, None], di[:, :, None],
        segment_ids[:, None], jnp.broadcast_to(segment_ids[:, :, None], (B, T, LANES)),
    )  # fmt: skip
