"""Causal grouped-query attention fused with RoPE, in two TPU kernels that stream tiles of a long row through VMEM.

`flash` holds a head's full row in VMEM. Here tiles of keys pass by tiles of queries, so that rows may be of any length
and shared by several devices. The backward kernel keeps one thing for all queries of a head: the sum of dq. Splash
attention writes a partial dq for each block of keys instead, 16 times q for a row of 32,768, and adds them up in HBM.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from solar_jax.model import flash
from solar_jax.model.attention import SAVED, WHOLE, Shard
from solar_jax.model.flash import LANES, MASKED, SCORES, block_size, first_keys
from solar_jax.model.rope import apply_rope

TILE = 2048  # queries and keys per grid step, at most


def streamed_memory(length: int, width: int, itemsize: int, chunks: int = 1) -> int:
    """VMEM bytes needed by the backward kernel, the larger one, for T = `length`, H = `width`.

    The sum of dq in float32 and rotated q, of all queries; of one tile, double-buffered: q, do, dq, k, v, dk and dv,
    float32 cosines and sines, three values per query; and float32 sums of dk and dv. A row of H elements takes full
    vectors.

    Args:
      length: T, the queries of one device.
      width: H.
      itemsize: bytes of an element of q.
      chunks: runs of consecutive tokens that they form.
    """
    row = -(-width // LANES) * LANES
    tile = block_size(length // chunks, TILE)
    return length * row * (4 + itemsize) + tile * (row * (14 * itemsize + 24) + 2 * 3 * 8 * 4) + SCORES


def visible_tables(first: jax.Array, starts: jax.Array, tile: int, block: int, length: int) -> tuple[jax.Array, ...]:
    """Returns int32 tables of what each block of queries sees, for the kernels' loops and DMAs.

    Args:
      first: `first_keys` of this device's queries, [B, T].
      starts: [T / tile], position of each tile of queries in the row, in tiles.
      tile: queries and keys per grid step.
      block: queries and keys per product.
      length: S.

    Returns:
      starts; [B, T / block], first block of keys that any query of a block sees; the same, that all of its queries see,
      if it is earlier than they are; and [B, S / tile] twice, first and last tile of queries that see a tile of keys.
    """
    earliest, whole = first[:, ::block] // block, -(-first[:, block - 1 :: block] // block)
    key_tiles = jnp.arange(length // tile)[None, :, None]
    begins = earliest[:, None, :: tile // block] // (tile // block)
    seen = (starts >= key_tiles) & (begins <= key_tiles)  # [B, S / tile, T / tile]
    low, high = jnp.argmax(seen, axis=2), starts.size - 1 - jnp.argmax(seen[:, :, ::-1], axis=2)
    return tuple(x.astype(jnp.int32) for x in (starts, earliest, whole, low, high))


def _loops(tables: Any, row: Any, i: Any, j: Any, u: Any, per: int) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Returns the blocks of key tile j that block u of query tile i sees: (count, index) masked, (begin, end) whole.

    Masked ones lie at the edge of a document or window, or on the diagonal.
    """
    starts, earliest, whole, *_ = tables
    at = i * per + u  # column of the tables
    query = (starts[i] - j) * per + u  # block of the row, counted from the tile of keys
    begin = jnp.clip(earliest[row, at] - j * per, 0, per)
    diagonal, end = jnp.clip(query, 0, per), jnp.clip(query + 1, 0, per)
    inner = jnp.clip(whole[row, at] - j * per, begin, diagonal)
    edge = inner - begin
    return (edge + end - diagonal, lambda n: jnp.where(n < edge, begin + n, diagonal + n - edge)), (inner, diagonal)


def _attends(starts: Any, first: jax.Array, i: Any, j: Any, u: Any, v: Any, per: int, block: int) -> jax.Array:
    """Mask [keys of block v of tile j, queries of block u of tile i] from the queries' first keys, [1, block]."""
    shape = (block, block)
    key = (j * per + v) * block + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    query = (starts[i] * per + u) * block + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (key <= query) & (key >= first)


def _forward_kernel(
    starts, earliest, whole, low, high, q_ref, k_ref, v_ref, cos_ref, sin_ref, first_ref, out_ref, lse_ref,
    q_rotated, out_sum, largest_ref, total_ref, *, block: int, scale: float,
):  # fmt: skip
    """Forward kernel, grid (B, T / tile, N, S / tile). Refs: [tile, H], but for first and lse, [1, tile].

    Scores are [keys, queries], so that per-query values run along the lanes; out_sum is float32 [tile / block, H,
    block] for the same reason, largest and total are [tile / block, 1, block].
    """
    from jax.experimental import pallas as pl

    row, i, j = pl.program_id(0), pl.program_id(1), pl.program_id(3)
    tables, per = (starts, earliest, whole, low, high), q_ref.shape[0] // block

    @pl.when(j == 0)
    def _():
        flash.rotate(q_ref, cos_ref, sin_ref, q_rotated, block, scale=scale)
        out_sum[...] = jnp.zeros_like(out_sum)
        largest_ref[...] = jnp.full_like(largest_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)

    def queries(u, _):
        q, first = q_rotated[pl.ds(u * block, block), :], first_ref[:, pl.ds(u * block, block)]
        (masked, index), (begin, end) = _loops(tables, row, i, j, u, per)

        def keys(v, carried, is_masked):
            largest, total = carried
            of = pl.ds(v * block, block)
            scores = flash.block_dot(k_ref[of, :], q, flash.ROWS_BY_ROWS)
            if is_masked:
                scores = jnp.where(_attends(starts, first, i, j, u, v, per, block), scores, MASKED)
            larger = jnp.maximum(largest, jnp.max(scores, axis=0, keepdims=True))
            p, shrink = jnp.exp(scores - larger), jnp.exp(largest - larger)
            value = flash.block_dot(v_ref[of, :], p.astype(v_ref.dtype), flash.COLUMNS_BY_COLUMNS)
            out_sum[u] = out_sum[u] * shrink + value
            return larger, total * shrink + jnp.sum(p, axis=0, keepdims=True)

        carried = largest_ref[u], total_ref[u]
        carried = jax.lax.fori_loop(0, masked, lambda n, c: keys(index(n), c, True), carried)
        largest_ref[u], total_ref[u] = jax.lax.fori_loop(begin, end, lambda v, c: keys(v, c, False), carried)

    @pl.when((j <= starts[i]) & (j >= jax.lax.div(earliest[row, i * per], per)))
    def _():
        jax.lax.fori_loop(0, per, queries, None)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        def finish(u, _):
            at = pl.ds(u * block, block)
            out_ref[at, :] = (out_sum[u] / total_ref[u]).T.astype(out_ref.dtype)
            lse_ref[:, at] = largest_ref[u] + jnp.log(total_ref[u])

        jax.lax.fori_loop(0, per, finish, None)


def _backward_kernel(
    starts, earliest, whole, low, high, q_ref, k_ref, v_ref, cos_ref, sin_ref, first_ref, do_ref, lse_ref, di_ref,
    dq_ref, dk_ref, dv_ref, q_rotated, dq_sum, dk_sum, dv_sum, *, block: int, scale: float,
):  # fmt: skip
    """Backward kernel, grid (B, N, S / tile, T / tile); shapes as in forward, plus do, dq, dk, dv: [tile, H].

    Sums are float32: dq [T, H], over all tiles of keys; dk and dv [tile, H], over all tiles of queries. dk and dv are
    those of one query head. q is rotated with the first tile of keys, dq is written with the last.
    """
    from jax.experimental import pallas as pl

    row, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    tables, tile = (starts, earliest, whole, low, high), q_ref.shape[0]
    per = tile // block

    @pl.when(j == 0)
    def _():
        flash.rotate(q_ref, cos_ref, sin_ref, q_rotated, block, scale=scale, write=i * tile)
        dq_sum[pl.ds(i * tile, tile), :] = jnp.zeros((tile, dq_sum.shape[1]), jnp.float32)

    @pl.when(i == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def queries(u, _):
        at, in_row = pl.ds(u * block, block), pl.ds(i * tile + u * block, block)
        q, do, lse, di, first = q_rotated[in_row, :], do_ref[at, :], lse_ref[:, at], di_ref[:, at], first_ref[:, at]
        (masked, index), (begin, end) = _loops(tables, row, i, j, u, per)

        def keys(v, is_masked):
            of = pl.ds(v * block, block)
            key, value = k_ref[of, :], v_ref[of, :]
            scores = flash.block_dot(key, q, flash.ROWS_BY_ROWS)
            if is_masked:
                scores = jnp.where(_attends(starts, first, i, j, u, v, per, block), scores, MASKED)
            p = jnp.exp(scores - lse)
            dv_sum[of, :] += flash.block_dot(p.astype(do.dtype), do, flash.ROWS_BY_COLUMNS)
            ds = ((flash.block_dot(value, do, flash.ROWS_BY_ROWS) - di) * p).astype(q.dtype)
            dk_sum[of, :] += flash.block_dot(ds, q, flash.ROWS_BY_COLUMNS)
            dq_sum[in_row, :] += flash.block_dot(ds, key, flash.COLUMNS_BY_COLUMNS)

        jax.lax.fori_loop(0, masked, lambda n, _: keys(index(n), True), None)
        jax.lax.fori_loop(begin, end, lambda v, _: keys(v, False), None)

    @pl.when((j <= starts[i]) & (j >= jax.lax.div(earliest[row, i * per], per)))
    def _():
        jax.lax.fori_loop(0, per, queries, None)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        flash.rotate(dq_sum, cos_ref, sin_ref, dq_ref, block, way=-1, scale=scale, read=i * tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, cos: jax.Array, sin: jax.Array, first: jax.Array, starts: jax.Array,
    tile: int, interpret: bool,
) -> jax.Array:  # fmt: skip
    """Attention [B, N, T, H] of q [B, N, T, H], rotated k and v [B, K, S, H] and angles [B, T, H].

    `first` and `starts` are those of `visible_tables`.
    """
    return _forward(q, k, v, cos, sin, first, starts, tile, interpret)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, cos: jax.Array, sin: jax.Array, first: jax.Array, starts: jax.Array,
    tile: int, interpret: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:  # fmt: skip
    """Returns the output and the residuals for the backward pass: inputs, output, log-sum-exps [B, N, 1, T]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (B, N, T, H), (K, S) = q.shape, k.shape[1:3]
    block = block_size(tile, flash.BLOCK)
    per = tile // block

    def keys(b, i, n, j, starts, earliest, *_):
        # Tiles that no query sees are not copied: their index is that of the nearest one that is.
        return b, jax.lax.div(n, N // K), jnp.clip(j, jax.lax.div(earliest[b, i * per], per), starts[i]), 0

    by_query = pl.BlockSpec((None, None, tile, H), lambda b, i, n, *_: (b, n, i, 0))
    by_key = pl.BlockSpec((None, None, tile, H), keys)
    angles = pl.BlockSpec((None, tile, H), lambda b, i, *_: (b, i, 0))
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, block=block, scale=H**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(B, T // tile, N, S // tile),
            in_specs=[
                by_query, by_key, by_key, angles, angles,
                pl.BlockSpec((None, 1, tile), lambda b, i, *_: (b, 0, i)),
            ],
            out_specs=[by_query, pl.BlockSpec((None, None, 1, tile), lambda b, i, n, *_: (b, n, 0, i))],
            scratch_shapes=[
                pltpu.VMEM((tile, H), q.dtype), pltpu.VMEM((per, H, block), jnp.float32),
                pltpu.VMEM((per, 1, block), jnp.float32), pltpu.VMEM((per, 1, block), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=streamed_memory(T, H, q.dtype.itemsize, T // tile),
        ),
        name="flash_attention_streamed_fwd",
        interpret=interpret,
    )(*visible_tables(first, starts, tile, block, S), q, k, v, cos, sin, first[:, None])  # fmt: skip
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, cos, sin, first, starts, out, lse)


def _backward(tile: int, interpret: bool, saved: tuple[jax.Array, ...], do: jax.Array) -> tuple[jax.Array | None, ...]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    q, k, v, cos, sin, first, starts, out, lse = saved
    (B, N, T, H), (K, S) = q.shape, k.shape[1:3]
    block, last = block_size(tile, flash.BLOCK), S // tile - 1
    di = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)[:, :, None]

    # An index that stays the same between steps copies nothing, in or out.
    def near(b, j, i, low, high):
        return jnp.clip(i, low[b, j], high[b, j])

    by_query = pl.BlockSpec(
        (None, None, tile, H), lambda b, n, j, i, s, e, w, low, high: (b, n, near(b, j, i, low, high), 0)
    )
    per_query = pl.BlockSpec(
        (None, None, 1, tile), lambda b, n, j, i, s, e, w, low, high: (b, n, 0, near(b, j, i, low, high))
    )
    keys = pl.BlockSpec((None, None, tile, H), lambda b, n, j, *_: (b, jax.lax.div(n, N // K), j, 0))
    angles = pl.BlockSpec((None, tile, H), lambda b, n, j, i, *_: (b, jnp.where((j == 0) | (j == last), i, 0), 0))
    d_key = pl.BlockSpec((None, None, tile, H), lambda b, n, j, *_: (b, n, j, 0))
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, block=block, scale=H**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(B, N, S // tile, T // tile),
            in_specs=[
                pl.BlockSpec((None, None, tile, H), lambda b, n, j, i, *_: (b, n, jnp.where(j == 0, i, 0), 0)),
                keys, keys, angles, angles,
                pl.BlockSpec(
                    (None, 1, tile), lambda b, n, j, i, s, e, w, low, high: (b, 0, near(b, j, i, low, high))
                ),
                by_query, per_query, per_query,
            ],
            out_specs=[
                pl.BlockSpec((None, None, tile, H), lambda b, n, j, i, *_: (b, n, jnp.where(j == last, i, 0), 0)),
                d_key, d_key,
            ],
            scratch_shapes=[
                pltpu.VMEM((T, H), q.dtype), pltpu.VMEM((T, H), jnp.float32),
                pltpu.VMEM((tile, H), jnp.float32), pltpu.VMEM((tile, H), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype), *[jax.ShapeDtypeStruct((B, N, S, H), k.dtype)] * 2,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=streamed_memory(T, H, q.dtype.itemsize, T // tile),
        ),
        name="flash_attention_streamed_dkv_fused",
        interpret=interpret,
    )(*visible_tables(first, starts, tile, block, S), q, k, v, cos, sin, first[:, None], do, lse, di)  # fmt: skip

    def by_key_head(x: jax.Array) -> jax.Array:
        of_key = x.reshape(B, K, N // K, S, H)  # XLA's reduction of this takes eight times as long as these sums
        return functools.reduce(jnp.add, (of_key[:, :, g].astype(jnp.float32) for g in range(N // K))).astype(x.dtype)

    return dq, by_key_head(dk), by_key_head(dv), None, None, None, None


_attention.defvjp(_forward, _backward)


def streamed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids: jax.Array | None, *,
    sliding_window: int, interpret: bool, shard: Shard = WHOLE,
) -> jax.Array:  # fmt: skip
    """Attention fused with RoPE of queries, without materialising [T, S] scores; angles get no gradient.

    Args and result are those of `splash.splash_attention`; segment ids must be non-decreasing along a row.
    """
    B, T = q.shape[:2]
    S = T * shard.count
    tile = block_size(T if shard.count == 1 else T // 2, TILE)  # within one chunk
    starts = shard.own(jnp.arange(S // tile, dtype=jnp.int32), 0)
    ids = jnp.zeros((B, S), jnp.int32) if segment_ids is None else segment_ids
    cos, sin = rope
    # The kernels take heads before tokens; XLA has the projections write that layout directly.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, apply_rope(k, rope), v))
    out = _attention(
        q, shard.whole(k, 2), shard.whole(v, 2),
        jnp.concatenate((cos, cos), axis=-1), jnp.concatenate((-sin, sin), axis=-1),
        shard.own(first_keys(ids, sliding_window), 1), starts, tile, interpret,
    )  # fmt: skip
    return jnp.swapaxes(out, 1, 2)
