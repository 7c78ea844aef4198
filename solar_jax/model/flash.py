"""Causal grouped-query attention fused with RoPE, in two TPU kernels that hold a head's full row in VMEM.

Splash attention streams blocks of rows of any length, but leaves to XLA several steps that cost HBM passes: RoPE on
queries and keys before and on their gradients after, summing the partial dq, taking the first of 128 equal lanes of
the softmax sums. Where a head's row fits in VMEM, the kernels do all of that there, and blocks can be small.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from solar_jax.model import flash_blocks
from solar_jax.model.attention import SAVED
from solar_jax.model.flash_blocks import LANES, MASKED, SCORES, block_size, first_keys, rotate, rotated


def needed_memory(length: int, width: int, itemsize: int) -> int:
    """VMEM bytes needed by the backward kernel, the larger one, for T = `length`, H = `width`.

    Double-buffered: per-query-head arrays (q, do, dq) and outputs (dk, dv). Single-buffered: arrays kept for a group or
    row (k, v, rotated k; float32 cosines and sines). Plus three values per query, and float32 accumulators for dk and
    dv. A row of H elements takes full vectors.
    """
    row = length * (-(-width // LANES) * LANES)
    return (2 * 5 + 3) * row * itemsize + 2 * row * 4 + 2 * row * 4 + 2 * 3 * 8 * length * 4 + SCORES


def _forward_kernel(
    begin, whole, q_ref, k_ref, v_ref, cos_ref, sin_ref, first_ref, out_ref, lse_ref, k_rotated, out_sum, *,
    block: int, scale: float,
):  # fmt: skip
    """Forward kernel for one query head.

    begin and whole are [B, T / block], q, k, v, cos, sin and out [T, H], first [T, LANES], lse [1, T], out_sum float32
    [block, H].
    """
    from jax.experimental import pallas as pl

    row, blocks = pl.program_id(0), q_ref.shape[0] // block

    @pl.when(pl.program_id(2) == 0)
    def _():
        rotate(k_ref, cos_ref, sin_ref, k_rotated, block)

    def queries(i, _):
        at = pl.ds(i * block, block)
        q = rotated(q_ref[at, :].astype(jnp.float32), cos_ref[at, :], sin_ref[at, :])
        q = (q * scale).astype(q_ref.dtype)
        out_sum[...] = jnp.zeros_like(out_sum)

        def keys(j, sums, masked):
            of = pl.ds(j * block, block)
            seen = flash_blocks.attends(first_ref[at, :1], i, j, block, 0) if masked else None
            return flash_blocks.forward_block(q, k_rotated[of, :], v_ref[of, :], seen, out_sum, sums)

        sums = jnp.full((block, LANES), MASKED, jnp.float32), jnp.zeros((block, LANES), jnp.float32)
        sums = flash_blocks.for_earlier_blocks(keys, begin[row, i], whole[row, i], i, blocks, sums)
        sums = keys(i, sums, True)
        out, lse_ref[:, at] = flash_blocks.finish_forward(out_sum[...], *sums)
        out_ref[at, :] = out.astype(out_ref.dtype)

    jax.lax.fori_loop(0, blocks, queries, None)


def _backward_kernel(
    begin, whole, q_ref, k_ref, v_ref, cos_ref, sin_ref, first_ref, do_ref, lse_ref, di_ref, dq_ref, dk_ref, dv_ref,
    k_rotated, dq_sum, dk_sum, dv_sum, *, block: int, scale: float,
):  # fmt: skip
    """Backward kernel for one query head; shapes as in forward, plus do, dq, dk, dv: [T, H], di and first: [1, T].

    Accumulators are float32: dq [block, H]; dk and dv [T, H], summed over all query heads of a key head.
    """
    from jax.experimental import pallas as pl

    row, head, blocks = pl.program_id(0), pl.program_id(2), q_ref.shape[0] // block

    @pl.when(head == 0)
    def _():
        rotate(k_ref, cos_ref, sin_ref, k_rotated, block)
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def queries(i, _):
        at = pl.ds(i * block, block)
        cos, sin = cos_ref[at, :], sin_ref[at, :]
        q = (rotated(q_ref[at, :].astype(jnp.float32), cos, sin) * scale).astype(q_ref.dtype)
        do, lse, di, first = do_ref[at, :], lse_ref[:, at], di_ref[:, at], first_ref[:, at]
        dq_sum[...] = jnp.zeros_like(dq_sum)

        def keys(j, _, masked):
            of = pl.ds(j * block, block)
            seen = flash_blocks.attends(first, i, j, block, 1) if masked else None
            flash_blocks.backward_block(
                q, do, lse, di, k_rotated[of, :], v_ref[of, :], seen, dq_sum, dk_sum.at[of, :], dv_sum.at[of, :]
            )

        flash_blocks.for_earlier_blocks(keys, begin[row, i], whole[row, i], i, blocks)
        keys(i, None, True)
        dq_ref[at, :] = rotated(dq_sum[...] * scale, cos, -sin).astype(dq_ref.dtype)

    jax.lax.fori_loop(0, blocks, queries, None)

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
        "q": pl.BlockSpec((None, None, T, H), lambda b, k, g, *_: (b, k * G + g, 0, 0)),
        "k": pl.BlockSpec((None, None, T, H), lambda b, k, g, *_: (b, k, 0, 0), **once),
        "dk": pl.BlockSpec((None, None, T, H), lambda b, k, g, *_: (b, k, 0, 0)),
        "per_query": pl.BlockSpec((None, None, 1, T), lambda b, k, g, *_: (b, k * G + g, 0, 0)),
        "angles": pl.BlockSpec((None, T, H), lambda b, k, g, *_: (b, 0, 0), **once),
        "first_row": pl.BlockSpec((None, 1, T), lambda b, k, g, *_: (b, 0, 0)),
        "first_column": pl.BlockSpec((None, T, LANES), lambda b, k, g, *_: (b, 0, 0), **once),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, cos: jax.Array, sin: jax.Array, first: jax.Array, interpret: bool
) -> jax.Array:
    """Attention [B, N, T, H] of q [B, N, T, H], k and v [B, K, T, H], angles [B, T, H] and `first_keys` [B, T]."""
    return _forward(q, k, v, cos, sin, first, interpret)[0]


def _run(
    kernel: Any, name: str, inputs: tuple[Any, ...], extra: tuple[tuple[str, Any], ...],
    outputs: tuple[tuple[str, Any], ...], sums: tuple[tuple[int, int], ...], interpret: bool,
) -> Any:  # fmt: skip
    """Runs a kernel for every row and head.

    Args:
      kernel: `_forward_kernel` or `_backward_kernel`.
      name: the kernel's name in profiles.
      inputs: q, k, v, cos, sin, first, as `_attention` takes them.
      extra: additional inputs, each with its kind in `_specs`.
      outputs: arrays with the shapes and dtypes of the results, each with its kind.
      sums: shapes of the float32 scratch buffers.
      interpret: run the kernel in interpret mode.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    q, k, v, cos, sin, first = inputs
    (B, N, T, H), K = q.shape, k.shape[1]
    specs, block = _specs(N, K, T, H), block_size(T, flash_blocks.BLOCK)
    kinds = ("q", "k", "k", "angles", "angles", *(kind for kind, _ in extra))
    return pl.pallas_call(
        functools.partial(kernel, block=block, scale=H**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
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
    )(*flash_blocks.visible_blocks(first, block), q, k, v, cos, sin, *(array for _, array in extra))


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, cos: jax.Array, sin: jax.Array, first: jax.Array, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the output and the residuals for the backward pass: inputs, output, log-sum-exps [B, N, 1, T]."""
    (B, N, T, H), inputs = q.shape, (q, k, v, cos, sin, first)
    sums = jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)
    out, lse = _run(
        _forward_kernel, "flash_attention_fwd", inputs, (("first_column", flash_blocks.in_lanes(first)),),
        (("q", q), ("per_query", sums)),
        ((block_size(T, flash_blocks.BLOCK), H),), interpret,
    )  # fmt: skip
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (*inputs, out, lse)


def _backward(interpret: bool, saved: tuple[jax.Array, ...], do: jax.Array) -> tuple[jax.Array | None, ...]:
    *inputs, out, lse = saved
    q, k, v, *_, first = inputs
    T, H = q.shape[2:]
    di = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)[:, :, None]
    dq, dk, dv = _run(
        _backward_kernel, "flash_attention_dkv_fused", tuple(inputs),
        (("first_row", first[:, None]), ("q", do), ("per_query", lse), ("per_query", di)),
        (("q", q), ("dk", k), ("dk", v)),
        ((block_size(T, flash_blocks.BLOCK), H), (T, H), (T, H)), interpret,
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
        first_keys(segment_ids, sliding_window), interpret,
    )  # fmt: skip
    return jnp.swapaxes(out, 1, 2)
