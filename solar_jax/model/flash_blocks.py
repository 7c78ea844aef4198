"""Block steps shared by the kernels of `flash` and `flash_streamed`: one block of queries and one of keys, in VMEM.

Key blocks that no query of a block sees, because they are later or of another document, are skipped; those that all of
its queries see are not masked. The forward pass computes scores as [queries, keys], so that both of its products pass
many rows by few weights, and the backward pass as [keys, queries], so that one product of five, not two, transposes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128  # lanes of a TPU vector; T must be a multiple
BLOCK = 512  # queries and keys per step, at most: 512 x 512 x H matmuls amortise the loop overhead
MASKED = -1e30  # finite, so that a masked score gives 0 rather than NaN
SCORES = 16 * 2**20  # bytes of VMEM for score blocks and the values derived from them

ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # a b^T
ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))  # a b
COLUMNS_BY_COLUMNS = (((0,), (0,)), ((), ()))  # a^T b


def block_dot(a: Any, b: Any, dimensions: Any) -> jax.Array:
    """Multiplies matrices into float32; float32 ones in full, where a kernel's default is one pass in bfloat16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def block_size(length: int, largest: int) -> int:
    """Returns the largest multiple of `LANES` that divides T and is at most `largest`."""
    return max(b for b in range(LANES, min(length, largest) + 1, LANES) if length % b == 0)


def first_keys(segment_ids: jax.Array, sliding_window: int) -> jax.Array:
    """Returns the position of the first key that each query sees; [B, S] -> int32 [B, S], non-decreasing along a row.

    Segment ids must be non-decreasing too.
    """
    position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    first = jax.lax.cummax(jnp.where(begins, position, 0), axis=1)
    return jnp.maximum(first, position - sliding_window + 1) if sliding_window else first


def visible_blocks(first: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Returns, from `first_keys`, the first key block that any query of each block sees, and that all of them see.

    Both are int32 [B, T / block]; the second may lie behind the block's own.
    """
    return first[:, ::block] // block, -(-first[:, block - 1 :: block] // block)


def rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Applies RoPE to float32 [T, H]; `sin` carries the sign of each half, and -sin rotates back."""
    from jax.experimental.pallas import tpu as pltpu

    half = x.shape[1] // 2
    if x.shape[1] % LANES:  # the hardware rolls full vectors only
        return x * cos + jnp.concatenate((x[:, half:], x[:, :half]), axis=1) * sin
    return x * cos + pltpu.roll(x, half, 1) * sin


def rotate(
    source: Any, cos: Any, sin: Any, target: Any, block: int, *, way: int = 1, scale: float = 1.0, read: Any = 0,
    write: Any = 0,
) -> None:  # fmt: skip
    """Rotates rows from one ref into another and scales them, block by block to keep the program small.

    Args:
      source: [T, H] or more rows.
      cos: float32 [T, H], of as many rows as are rotated.
      sin: the same.
      target: [T, H] or more rows.
      block: rows at a time.
      way: 1, or -1 to rotate back.
      scale: factor of the result.
      read: first row of `source`.
      write: first row of `target`.
    """
    from jax.experimental import pallas as pl

    def one(i, _):
        at = pl.ds(i * block, block)
        x = rotated(source[pl.ds(read + i * block, block), :].astype(jnp.float32), cos[at, :], way * sin[at, :])
        target[pl.ds(write + i * block, block), :] = (x * scale).astype(target.dtype)

    jax.lax.fori_loop(0, cos.shape[0] // block, one, None)


def edge_and_whole(begin: Any, whole: Any, query: Any, count: Any) -> tuple[Any, Any, Any]:
    """Returns where the blocks of keys before the diagonal that a block of queries sees begin, are whole, and end.

    Those of the first range lie at the edge of a document or window, and need a mask; those of the second do not.

    Args:
      begin: of `visible_blocks`, counted from the first block of keys that is there.
      whole: of `visible_blocks`, counted likewise.
      query: index of the block of queries, counted likewise.
      count: blocks of keys that are there.
    """
    begin, end = jnp.clip(begin, 0, count), jnp.clip(query, 0, count)
    return begin, jnp.clip(whole, begin, end), end


def for_earlier_blocks(
    step: Callable[..., Any], begin: Any, whole: Any, query: Any, count: Any, carried: Any = None
) -> Any:
    """Calls step(index, carried, masked) for each block of keys of `edge_and_whole`; returns the last value carried."""
    edge, inner, end = edge_and_whole(begin, whole, query, count)
    carried = jax.lax.fori_loop(edge, inner, lambda j, carried: step(j, carried, True), carried)
    return jax.lax.fori_loop(inner, end, lambda j, carried: step(j, carried, False), carried)


def attends(first: jax.Array, query: Any, key: Any, block: int, axis: int) -> jax.Array:
    """Mask [block, block] of the keys that each query sees; queries lie along `axis`, keys along the other one.

    Args:
      first: `first_keys` of the queries, [block, 1] or [1, block].
      query: index of the block of queries, counted from where `first` is.
      key: index of the block of keys, counted likewise.
      block: queries and keys.
      axis: of queries.
    """
    shape = (block, block)
    keys = key * block + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - axis)
    return (keys <= query * block + jax.lax.broadcasted_iota(jnp.int32, shape, axis)) & (keys >= first)


def in_lanes(first: jax.Array) -> jax.Array:
    """[B, T] -> [B, T, LANES], the same in all lanes: a block's column is loaded faster than it is transposed."""
    return jnp.broadcast_to(first[:, :, None], (*first.shape, LANES))


def across(x: jax.Array, width: int) -> jax.Array:
    """[block, LANES], the same in all lanes -> [block, width]."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def forward_block(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None, out_sum: Any, sums: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Adds a block of keys to the sums of a block of queries.

    Args:
      q: rotated and scaled, [block, H].
      k: rotated, [block, H].
      v: [block, H].
      seen: mask [queries, keys]; None if all see all.
      out_sum: float32 ref [block, H], of values weighted by exp(score - largest).
      sums: float32 [block, LANES], the largest score so far and the sum of the weights, the same in all lanes: a column
        would be spread over the lanes again for each block.

    Returns:
      The new `sums`.
    """
    largest, total = sums
    scores = block_dot(q, k, ROWS_BY_ROWS)
    if seen is not None:
        scores = jnp.where(seen, scores, MASKED)
    larger = jnp.maximum(largest, jnp.max(scores, axis=1, keepdims=True))
    p, shrink = jnp.exp(scores - across(larger, scores.shape[1])), jnp.exp(largest - larger)
    weighted = block_dot(p.astype(v.dtype), v, ROWS_BY_COLUMNS)
    out_sum[...] = out_sum[...] * across(shrink, v.shape[1]) + weighted
    return larger, total * shrink + jnp.sum(p, axis=1, keepdims=True)


def finish_forward(out_sum: jax.Array, largest: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the output [block, H] and the log-sum-exps [1, block] of the sums of all blocks of keys, in float32."""
    return out_sum / across(total, out_sum.shape[1]), (largest + jnp.log(total))[:, :1].T


def backward_block(
    q: jax.Array, do: jax.Array, lse: jax.Array, di: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None,
    dq_sum: Any, dk_sum: Any, dv_sum: Any,
) -> None:  # fmt: skip
    """Adds to gradients what a block of queries and one of keys give.

    Args:
      q: rotated and scaled, [block, H].
      do: [block, H].
      lse: log-sum-exps, float32 [1, block].
      di: sums of out * do, float32 [1, block].
      k: rotated, [block, H].
      v: [block, H].
      seen: mask [keys, queries]; None if all see all.
      dq_sum: float32 ref [block, H], still to be scaled and rotated back.
      dk_sum: the same, to be rotated back.
      dv_sum: the same, final.
    """
    scores = block_dot(k, q, ROWS_BY_ROWS)
    if seen is not None:
        scores = jnp.where(seen, scores, MASKED)
    p = jnp.exp(scores - lse)
    dv_sum[...] += block_dot(p.astype(do.dtype), do, ROWS_BY_COLUMNS)
    ds = ((block_dot(v, do, ROWS_BY_ROWS) - di) * p).astype(q.dtype)
    dk_sum[...] += block_dot(ds, q, ROWS_BY_COLUMNS)
    dq_sum[...] += block_dot(ds, k, COLUMNS_BY_COLUMNS)
