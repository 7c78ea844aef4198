"""Causal grouped-query attention fused with RoPE, in two TPU kernels that hold a head's full row in VMEM.

Splash attention streams blocks of rows of any length, but leaves to XLA several steps that cost HBM passes: RoPE on
queries and keys before and on their gradients after, summing the partial dq, taking the first of 128 equal lanes of
the softmax sums. Where a head's row fits in VMEM, the kernels do all of that there, blocks can be small, and key blocks
that no query of a block sees, because they are later or of another document, are skipped.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from solar_jax.model.attention import SAVED

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


def needed_memory(length: int, width: int, itemsize: int) -> int:
    """VMEM bytes needed by the backward kernel, the larger one, for T = `length`, H = `width`.

    Double-buffered: per-query-head arrays (q, do, dq) and outputs (dk, dv). Single-buffered: arrays kept for a group or
    row (k, v, rotated k; float32 cosines and sines, int32 segment ids). Plus float32 accumulators for dk and dv. A row
    of H elements takes full vectors.
    """
    row = length * (-(-width // LANES) * LANES)
    lanes = length * LANES * 4
    return (2 * 5 + 3) * row * itemsize + 2 * row * 4 + lanes + 2 * row * 4 + 2 * 3 * 8 * length * 4 + SCORES


def first_keys(segment_ids: jax.Array, sliding_window: int) -> jax.Array:
    """Returns the position of the first key that each query sees; [B, S] -> int32 [B, S], non-decreasing along a row.

    Segment ids must be non-decreasing too.
    """
    position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    first = jax.lax.cummax(jnp.where(begins, position, 0), axis=1)
    return jnp.maximum(first, position - sliding_window + 1) if sliding_window else first


def first_blocks(segment_ids: jax.Array, block: int, sliding_window: int) -> jax.Array:
    """Returns the first key block that any query of each block sees, as its first does; int32 [B, T / block]."""
    return first_keys(segment_ids, sliding_window)[:, ::block] // block


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


def _seen(i: Any, j: Any, block: int, q_segment: jax.Array, k_segment: jax.Array, sliding_window: int) -> jax.Array:
    """Mask [keys of block j, queries of block i] of the keys each query sees."""
    shape = (block, block)
    age = (i - j) * block + (
        jax.lax.broadcasted_iota(jnp.int32, shape, 1) - jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    )
    seen = (k_segment == q_segment) & (age >= 0)
    return seen & (age < sliding_window) if sliding_window else seen


def _forward_kernel(
    first_ref, q_ref, k_ref, v_ref, cos_ref, sin_ref, q_segment_ref, k_segment_ref, out_ref, lse_ref,
    k_rotated, out_sum, *, block: int, sliding_window: int, scale: float,
):  # fmt: skip
    """Forward kernel for one query head. first: [B, T / block]; q, k, v, cos, sin, out: [T, H]; q_segment, lse: [1, T].

    k_segment: [T, LANES], the same in all lanes. Scores are [keys, queries], so that per-query values run along the
    lanes; out_sum is float32 [H, block] for the same reason.
    """
    from jax.experimental import pallas as pl

    row = pl.program_id(0)

    @pl.when(pl.program_id(2) == 0)
    def _():
        rotate(k_ref, cos_ref, sin_ref, k_rotated, block)

    def queries(i, _):
        at = pl.ds(i * block, block)
        q = rotated(q_ref[at, :].astype(jnp.float32), cos_ref[at, :], sin_ref[at, :])
        q = (q * scale).astype(q_ref.dtype)
        q_segment = q_segment_ref[:, at]
        out_sum[...] = jnp.zeros_like(out_sum)

        def keys(j, carried):
            largest, total = carried
            of = pl.ds(j * block, block)
            scores = block_dot(k_rotated[of, :], q, ROWS_BY_ROWS)
            seen = _seen(i, j, block, q_segment, k_segment_ref[of, :1], sliding_window)
            scores = jnp.where(seen, scores, MASKED)
            larger = jnp.maximum(largest, jnp.max(scores, axis=0, keepdims=True))
            p, shrink = jnp.exp(scores - larger), jnp.exp(largest - larger)
            out_sum[...] = out_sum[...] * shrink + block_dot(v_ref[of, :], p.astype(v_ref.dtype), COLUMNS_BY_COLUMNS)
            return larger, total * shrink + jnp.sum(p, axis=0, keepdims=True)

        start = jnp.full((1, block), MASKED, jnp.float32), jnp.zeros((1, block), jnp.float32)
        largest, total = jax.lax.fori_loop(first_ref[row, i], i + 1, keys, start)
        out_ref[at, :] = (out_sum[...] / total).T.astype(out_ref.dtype)
        lse_ref[:, at] = largest + jnp.log(total)

    jax.lax.fori_loop(0, q_ref.shape[0] // block, queries, None)


def _backward_kernel(
    first_ref, q_ref, k_ref, v_ref, cos_ref, sin_ref, q_segment_ref, k_segment_ref, do_ref, lse_ref, di_ref,
    dq_ref, dk_ref, dv_ref, k_rotated, dq_sum, dk_sum, dv_sum, *, block: int, sliding_window: int, scale: float,
):  # fmt: skip
    """Backward kernel for one query head; shapes as in forward, plus do, dq, dk, dv: [T, H], di: [1, T].

    Accumulators are float32: dq [block, H]; dk and dv [T, H], summed over all query heads of a key head.
    """
    from jax.experimental import pallas as pl

    row, head = pl.program_id(0), pl.program_id(2)

    @pl.when(head == 0)
    def _():
        rotate(k_ref, cos_ref, sin_ref, k_rotated, block)
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def queries(i, _):
        at = pl.ds(i * block, block)
        cos, sin = cos_ref[at, :], sin_ref[at, :]
        q = (rotated(q_ref[at, :].astype(jnp.float32), cos, sin) * scale).astype(q_ref.dtype)
        do, lse, di, q_segment = do_ref[at, :], lse_ref[:, at], di_ref[:, at], q_segment_ref[:, at]
        dq_sum[...] = jnp.zeros_like(dq_sum)

        def keys(j, _):
            of = pl.ds(j * block, block)
            k, v = k_rotated[of, :], v_ref[of, :]
            seen = _seen(i, j, block, q_segment, k_segment_ref[of, :1], sliding_window)
            p = jnp.exp(jnp.where(seen, block_dot(k, q, ROWS_BY_ROWS), MASKED) - lse)
            dv_sum[of, :] += block_dot(p.astype(do.dtype), do, ROWS_BY_COLUMNS)
            ds = ((block_dot(v, do, ROWS_BY_ROWS) - di) * p).astype(q.dtype)
            dk_sum[of, :] += block_dot(ds, q, ROWS_BY_COLUMNS)
            dq_sum[...] += block_dot(ds, k, COLUMNS_BY_COLUMNS)

        jax.lax.fori_loop(first_ref[row, i], i + 1, keys, None)
        dq_ref[at, :] = rotated(dq_sum[...] * scale, cos, -sin).astype(dq_ref.dtype)

    jax.lax.fori_loop(0, q_ref.shape[0] // block, queries, None)

    @pl.when(head == pl.num_programs(2) - 1)
    def _():
        rotate(dk_sum, cos_ref, sin_ref, dk_ref, block, way=-1)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


@functools.cache
def _specs(N: int, K: int, T: int, H: int) -> dict[str, Any]:
    """BlockSpecs by kind of array, for a grid of (rows, key heads, query heads per key head)."""
    from jax.experimental import pallas as pl

    # Arrays that stay the same from one query head to the next need no double buffering.
    once = {"pipeline_mode": pl.Buffered(buffer_count=1)}
    G = N // K
    return {
        "q": pl.BlockSpec((None, None, T, H), lambda b, k, g, _: (b, k * G + g, 0, 0)),
        "k": pl.BlockSpec((None, None, T, H), lambda b, k, g, _: (b, k, 0, 0), **once),
        "dk": pl.BlockSpec((None, None, T, H), lambda b, k, g, _: (b, k, 0, 0)),
        "per_query": pl.BlockSpec((None, None, 1, T), lambda b, k, g, _: (b, k * G + g, 0, 0)),
        "angles": pl.BlockSpec((None, T, H), lambda b, k, g, _: (b, 0, 0), **once),
        "q_segment": pl.BlockSpec((None, 1, T), lambda b, k, g, _: (b, 0, 0)),
        "k_segment": pl.BlockSpec((None, T, LANES), lambda b, k, g, _: (b, 0, 0), **once),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, cos: jax.Array, sin: jax.Array, segment_ids: jax.Array,
    sliding_window: int, interpret: bool,
) -> jax.Array:  # fmt: skip
    """Attention [B, N, T, H] of q [B, N, T, H], k and v [B, K, T, H], angles [B, T, H] and segment ids int32 [B, T]."""
    return _forward(q, k, v, cos, sin, segment_ids, sliding_window, interpret)[0]


def _run(
    kernel: Any, name: str, inputs: tuple[Any, ...], extra: tuple[tuple[str, Any], ...],
    outputs: tuple[tuple[str, Any], ...], sums: tuple[tuple[int, int], ...], sliding_window: int, interpret: bool,
) -> Any:  # fmt: skip
    """Runs a kernel for every row and head.

    Args:
      kernel: `_forward_kernel` or `_backward_kernel`.
      name: the kernel's name in profiles.
      inputs: q, k, v, cos, sin, segment_ids, as `_attention` takes them.
      extra: additional inputs, each with its kind in `_specs`.
      outputs: arrays with the shapes and dtypes of the results, each with its kind.
      sums: shapes of the float32 scratch buffers.
      sliding_window: keys each query sees, including itself; 0 for all earlier ones.
      interpret: run the kernel in interpret mode.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    q, k, v, cos, sin, segment_ids = inputs
    (B, N, T, H), K = q.shape, k.shape[1]
    specs, block = _specs(N, K, T, H), block_size(T, BLOCK)
    kinds = ("q", "k", "k", "angles", "angles", "q_segment", "k_segment", *(kind for kind, _ in extra))
    return pl.pallas_call(
        functools.partial(kernel, block=block, sliding_window=sliding_window, scale=H**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, N // K),
            in_specs=[specs[kind] for kind in kinds],
            out_specs=[specs[kind] for kind, _ in outputs],
            scratch_shapes=[pltpu.VMEM((T, H), k.dtype), *(pltpu.VMEM(shape, jnp.float32) for shape in sums)],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=needed_memory(T, H, q.dtype.itemsize),
        ),
        name=name,
        interpret=interpret,
    )(
        first_blocks(segment_ids, block, sliding_window), q, k, v, cos, sin, segment_ids[:, None],
        jnp.broadcast_to(segment_ids[:, :, None], (B, T, LANES)), *(array for _, array in extra),
    )  # fmt: skip


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, cos: jax.Array, sin: jax.Array, segment_ids: jax.Array,
    sliding_window: int, interpret: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:  # fmt: skip
    """Returns the output and the residuals for the backward pass: inputs, output, log-sum-exps [B, N, 1, T]."""
    (B, N, T, H), inputs = q.shape, (q, k, v, cos, sin, segment_ids)
    sums = jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)
    out, lse = _run(
        _forward_kernel, "flash_attention_fwd", inputs, (), (("q", q), ("per_query", sums)),
        ((H, block_size(T, BLOCK)),), sliding_window, interpret,
    )  # fmt: skip
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (*inputs, out, lse)


def _backward(
    sliding_window: int, interpret: bool, saved: tuple[jax.Array, ...], do: jax.Array
) -> tuple[jax.Array | None, ...]:
    *inputs, out, lse = saved
    q, k, v = inputs[:3]
    T, H = q.shape[2:]
    di = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)[:, :, None]
    dq, dk, dv = _run(
        _backward_kernel, "flash_attention_dkv_fused", tuple(inputs),
        (("q", do), ("per_query", lse), ("per_query", di)), (("q", q), ("dk", k), ("dk", v)),
        ((block_size(T, BLOCK), H), (T, H), (T, H)), sliding_window, interpret,
    )  # fmt: skip
    return dq, dk, dv, None, None, None


_attention.defvjp(_forward, _backward)


def flash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, rope: tuple[jax.Array, jax.Array], segment_ids: jax.Array | None, *,
    sliding_window: int, interpret: bool,
) -> jax.Array:  # fmt: skip
    """Attention fused with RoPE, without materialising [T, S] scores; angles get no gradient.

    Args:
      q: [B, T, N, H] before RoPE, T a multiple of `LANES`; the rows of one device.
      k: [B, T, K, H] before RoPE.
      v: [B, T, K, H].
      rope: cosines and sines, float32 [B, T, H/2], from `model.rope.rope_angles`.
      segment_ids: [B, T], document index of each token, non-decreasing along a row; None if every row is one document.
      sliding_window: keys each query sees, including itself; 0 for all earlier ones.
      interpret: run the kernels in interpret mode, for machines without a TPU.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    cos, sin = rope
    if segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    # The kernels take heads before tokens; XLA has the projections write that layout directly.
    out = _attention(
        *(jnp.swapaxes(x, 1, 2) for x in (q, k, v)),
        jnp.concatenate((cos, cos), axis=-1), jnp.concatenate((-sin, sin), axis=-1),
        segment_ids.astype(jnp.int32), sliding_window, interpret,
    )  # fmt: skip
    return jnp.swapaxes(out, 1, 2)
