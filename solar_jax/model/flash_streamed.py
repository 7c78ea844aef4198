"""Causal grouped-query attention fused with RoPE, in two TPU kernels that stream tiles of a long row through VMEM.

`flash` holds a head's full row in VMEM. Here tiles of keys pass by tiles of queries, so that rows may be of any length
and shared by several devices. The backward kernel keeps one thing for all queries of a head: the sum of dq. Splash
attention writes a partial dq for each block of keys instead, 16 times q for a row of 32,768, and adds them up in HBM.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from solar_jax.model import flash_blocks
from solar_jax.model.attention import SAVED, WHOLE, Shard
from solar_jax.model.flash_blocks import LANES, MASKED, SCORES, block_size, first_keys, rotate
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
      starts; the two [B, T / block] of `flash_blocks.visible_blocks`; and [B, S / tile] twice, first and last tile of
      queries that see a tile of keys.
    """
    earliest, whole = flash_blocks.visible_blocks(first, block)
    key_tiles = jnp.arange(length // tile)[None, :, None]
    begins = earliest[:, None, :: tile // block] // (tile // block)
    seen = (starts >= key_tiles) & (begins <= key_tiles)  # [B, S / tile, T / tile]
    low, high = jnp.argmax(seen, axis=2), starts.size - 1 - jnp.argmax(seen[:, :, ::-1], axis=2)
    return tuple(x.astype(jnp.int32) for x in (starts, earliest, whole, low, high))


def _forward_kernel(
    starts, earliest, whole, low, high, q_ref, k_ref, v_ref, cos_ref, sin_ref, first_ref, out_ref, lse_ref,
    q_rotated, out_sum, largest_ref, total_ref, *, block: int, scale: float,
):  # fmt: skip
    """Forward kernel, grid (B, N, T / tile, S / tile). Refs: [tile, H], but for lse, [1, tile], first [tile, LANES].

    out_sum is float32 [tile, H], largest and total are [tile, LANES].
    """
    from jax.experimental import pallas as pl

    row, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    tile = q_ref.shape[0]
    per = tile // block

    @pl.when(j == 0)
    def _():
        rotate(q_ref, cos_ref, sin_ref, q_rotated, block, scale=scale)
        out_sum[...] = jnp.zeros_like(out_sum)
        largest_ref[...] = jnp.full_like(largest_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)

    def attend(u, v, sums, masked):
        at, of = pl.ds(u * block, block), pl.ds(v * block, block)
        query = (starts[i] - j) * per + u
        seen = flash_blocks.attends(first_ref[at, :1] - j * tile, query, v, block, 0) if masked else None
        return flash_blocks.forward_block(q_rotated[at, :], k_ref[of, :], v_ref[of, :], seen, out_sum.at[at, :], sums)

    def whole_tile(u, _):
        at = pl.ds(u * block, block)
        sums = largest_ref[at, :], total_ref[at, :]
        for v in range(per):  # unrolled: the softmax of one block of keys runs beside the products of the next
            sums = attend(u, v, sums, False)
        largest_ref[at, :], total_ref[at, :] = sums

    def queries(u, _):
        at, in_row, query = pl.ds(u * block, block), i * per + u, (starts[i] - j) * per + u
        largest_ref[at, :], total_ref[at, :] = flash_blocks.for_earlier_blocks(
            functools.partial(attend, u), earliest[row, in_row] - j * per, whole[row, in_row] - j * per, query, per,
            (largest_ref[at, :], total_ref[at, :]),
        )  # fmt: skip

        @pl.when(query < per)
        def _():
            largest_ref[at, :], total_ref[at, :] = attend(u, query, (largest_ref[at, :], total_ref[at, :]), True)

    is_seen = (j <= starts[i]) & (j >= jax.lax.div(earliest[row, i * per], per))
    is_whole = (j < starts[i]) & (whole[row, i * per + per - 1] <= j * per)

    @pl.when(is_whole)
    def _():
        jax.lax.fori_loop(0, per, whole_tile, None)

    @pl.when(is_seen & ~is_whole)
    def _():
        jax.lax.fori_loop(0, per, queries, None)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        def finish(u, _):
            at = pl.ds(u * block, block)
            out, lse_ref[:, at] = flash_blocks.finish_forward(out_sum[at, :], largest_ref[at, :], total_ref[at, :])
            out_ref[at, :] = out.astype(out_ref.dtype)

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
    tile = q_ref.shape[0]
    per = tile // block

    @pl.when(j == 0)
    def _():
        rotate(q_ref, cos_ref, sin_ref, q_rotated, block, scale=scale, write=i * tile)
        dq_sum[pl.ds(i * tile, tile), :] = jnp.zeros((tile, dq_sum.shape[1]), jnp.float32)

    @pl.when(i == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def queries(u, _):
        at, in_row, of_row = pl.ds(u * block, block), i * per + u, pl.ds(i * tile + u * block, block)
        q, do, lse, di, first = q_rotated[of_row, :], do_ref[at, :], lse_ref[:, at], di_ref[:, at], first_ref[:, at]
        query = (starts[i] - j) * per + u

        def keys(v, _, masked):
            of = pl.ds(v * block, block)
            seen = flash_blocks.attends(first - j * tile, query, v, block, 1) if masked else None
            flash_blocks.backward_block(
                q, do, lse, di, k_ref[of, :], v_ref[of, :], seen,
                dq_sum.at[of_row, :], dk_sum.at[of, :], dv_sum.at[of, :],
            )  # fmt: skip

        flash_blocks.for_earlier_blocks(keys, earliest[row, in_row] - j * per, whole[row, in_row] - j * per, query, per)
        pl.when(query < per)(lambda: keys(query, None, True))

    @pl.when((j <= starts[i]) & (j >= jax.lax.div(earliest[row, i * per], per)))
    def _():
        jax.lax.fori_loop(0, per, queries, None)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        rotate(dq_sum, cos_ref, sin_ref, dq_ref, block, way=-1, scale=scale, read=i * tile)


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
    block = block_size(tile, flash_blocks.BLOCK)
    per = tile // block

    def keys(b, n, i, j, starts, earliest, *_):
        # Tiles that no query sees are not copied: their index is that of the nearest one that is.
        return b, jax.lax.div(n, N // K), jnp.clip(j, jax.lax.div(earliest[b, i * per], per), starts[i]), 0

    by_query = pl.BlockSpec((None, None, tile, H), lambda b, n, i, *_: (b, n, i, 0))
    by_key = pl.BlockSpec((None, None, tile, H), keys)
    angles = pl.BlockSpec((None, tile, H), lambda b, n, i, *_: (b, i, 0))
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, block=block, scale=H**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(B, N, T // tile, S // tile),
            in_specs=[
                by_query, by_key, by_key, angles, angles,
                pl.BlockSpec((None, tile, LANES), lambda b, n, i, *_: (b, i, 0)),
            ],
            out_specs=[by_query, pl.BlockSpec((None, None, 1, tile), lambda b, n, i, *_: (b, n, 0, i))],
            scratch_shapes=[
                pltpu.VMEM((tile, H), q.dtype), pltpu.VMEM((tile, H), jnp.float32),
                pltpu.VMEM((tile, LANES), jnp.float32), pltpu.VMEM((tile, LANES), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            # Where a chip has two cores they share heads: tiles of queries see unequal numbers of keys.
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=streamed_memory(T, H, q.dtype.itemsize, T // tile),
        ),
        name="flash_attention_streamed_fwd",
        interpret=interpret,
    )(*visible_tables(first, starts, tile, block, S), q, k, v, cos, sin, flash_blocks.in_lanes(first))  # fmt: skip
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, cos, sin, first, starts, out, lse)


def _backward(tile: int, interpret: bool, saved: tuple[jax.Array, ...], do: jax.Array) -> tuple[jax.Array | None, ...]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    q, k, v, cos, sin, first, starts, out, lse = saved
    (B, N, T, H), (K, S) = q.shape, k.shape[1:3]
    block, last = block_size(tile, flash_blocks.BLOCK), S // tile - 1
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
