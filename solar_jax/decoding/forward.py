"""The decoder with a cache of keys and values: a prompt at once, then one token a row at a time.

A forward pass reads the cache and returns the keys and values of its own tokens, which are written behind it for all
layers at once. So the cache is read once a step and never copied.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from solar_jax.config import ModelConfig
from solar_jax.decoding.weights import matrix_einsum
from solar_jax.model.attention import attention, attention_mask
from solar_jax.model.llama import (
    Block,
    Constrain,
    Llama,
    graph,
    rms_norm,
    scaled,
    unconstrained,
    unembed,
)
from solar_jax.model.rope import apply_rope, rope_angles
from solar_jax.model.shapes import Params
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import platform

# Keys and values after rotation: {"k", "v"}, each [L, B, K, S, H], or if they are held apart a tuple of [B, K, S, H].
Cache = dict[str, Any]
Head = dict[str, jax.Array]  # {"embed": [V, D]} where it is tied, else {"lm_head": [D, V]}
_SUBLANES = 8  # of a TPU's vector registers
_NEVER = jnp.finfo(jnp.float32).min


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the cache is held."""

    apart: bool = False  # each layer's by itself: what a CPU would copy a part of, and a TPU write one by one
    mesh: Mesh | None = None  # rows are split over its axes of the batch, key heads over tensor; None: one device

    @property
    def rows_axis(self) -> int:
        """B's place in an array of the cache."""
        return 0 if self.apart else 1

    @property
    def least_rows(self) -> int:
        """Rows that a projection multiplies at least."""
        return _SUBLANES if self.mesh is not None and platform(self.mesh) == "tpu" else 1

    @property
    def cache_spec(self) -> PartitionSpec:
        """How an array of the cache is split."""
        axes = (rules.BATCH_AXES, "tensor", None, None)
        return PartitionSpec(*axes) if self.apart else PartitionSpec(None, *axes)


def empty_cache(cfg: ModelConfig, rows: int, length: int, dtype: Any, layout: Layout) -> Cache:
    """Creates a cache of S = `length` positions for B = `rows` rows."""
    shape = (rows, cfg.num_key_value_heads, length, cfg.head_dim)
    L = cfg.num_hidden_layers

    def create() -> Cache:
        if layout.apart:
            return {name: tuple(jnp.zeros(shape, dtype) for _ in range(L)) for name in "kv"}
        return {name: jnp.zeros((L, *shape), dtype) for name in "kv"}

    sharding = None if layout.mesh is None else NamedSharding(layout.mesh, layout.cache_spec)
    return jax.jit(create, out_shardings=sharding)()


def cache_bytes(cfg: ModelConfig, rows: int, length: int, dtype: Any) -> int:
    """Returns the bytes of such a cache."""
    return (
        2 * cfg.num_hidden_layers * rows * length * cfg.num_key_value_heads * cfg.head_dim * jnp.dtype(dtype).itemsize
    )


def cached_hidden(
    cfg: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache | None, *,
    compute_dtype: Any, constrain: Constrain = unconstrained, layout: Layout = Layout(),
) -> tuple[jax.Array, Head, Cache]:  # fmt: skip
    """Runs tokens through the model: those of one prompt, or one of each row behind what the cache holds of it.

    What the cache holds at a row's position or beyond, such as a prompt's padding, is not seen: it is overwritten by
    the tokens that come to stand there.

    Args:
      cfg: the architecture.
      params: from `weights.laid_out`.
      tokens: [T] of a prompt, or [B], one of each row.
      positions: of the tokens; those of a prompt count from 0.
      cache: of B rows; None for a prompt.
      compute_dtype: dtype of matmuls and activations.
      constrain: lays out activations; the tokens are their axis T, and B is 1.
      layout: of the cache.

    Returns:
      The final norm's output [T or B, D], the output projection, for `projected`, and the tokens' keys and values: a
      cache of B = 1 and S = T, or of B rows and S = 1, for `with_row` and `written`.
    """
    rope = rope_angles(positions[None], cfg)
    einsum = matrix_einsum(cfg, layout.least_rows)

    def laid(x: Any, letters: str) -> Any:
        """Activations are laid out; matrices of projections stay as they lie."""
        return constrain(x, letters) if "B" in letters or "." in letters else x

    def merge(layers: Params) -> Llama:
        return nnx.merge(graph(cfg), params | {"layers": layers})

    def through(x: jax.Array, block: Block, *held: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One layer; `held` is its part of the cache."""
        own: list[jax.Array] = []

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, rope: Any, _: Any) -> jax.Array:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
            if not held:  # [1, T, K, H] -> [1, K, T, H]
                own.extend((k.swapaxes(1, 2), v.swapaxes(1, 2)))
                return attention(q, k, v, attention_mask(len(tokens), None, cfg.sliding_window))
            own.extend(x[0][:, :, None] for x in (k, v))  # [1, B, K, H] -> [B, K, 1, H]
            new, old = (own[0], own[1]), (held[0], held[1])
            return _rows_attention(q[0], new, old, positions, cfg.sliding_window, layout.least_rows)[None]

        return block(x, rope, None, laid, attend, einsum), own[0], own[1]

    layers = params["layers"]
    model = merge(layers[0])
    x = constrain(model.embed[...][tokens[None]], "BTD")
    x = scaled(x.astype(compute_dtype), cfg.embedding_multiplier)
    own = {"k": [], "v": []}
    for i, layer in enumerate(layers):
        held = () if cache is None else (cache["k"][i], cache["v"][i])
        x, k, v = through(x, merge(layer).layers, *held)
        own["k"].append(k)
        own["v"].append(v)
    new: Cache = {name: tuple(parts) if layout.apart else jnp.stack(parts) for name, parts in own.items()}
    x = scaled(rms_norm(x, model.final_norm[...], cfg.rms_norm_eps), cfg.logits_multiplier)
    head = {"embed": model.embed[...]} if cfg.tie_word_embeddings else {"lm_head": model.lm_head[...]}
    return x[0], head, new


def projected(x: jax.Array, head: Head, layout: Layout) -> jax.Array:
    """Projects to logits: [B, D] -> float32 [B, V]. A tied embedding is read as it lies, [V, D]."""
    B = len(x)
    x = jnp.pad(x, ((0, max(0, layout.least_rows - B)), (0, 0)))
    if "lm_head" in head:
        return unembed(x, head["lm_head"])[:B]
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("bd,vd->bv", x, head["embed"], precision=precision, preferred_element_type=jnp.float32)[:B]


def _rows_attention(
    q: jax.Array, own: tuple[jax.Array, jax.Array], held: tuple[jax.Array, jax.Array], positions: jax.Array,
    window: int, least: int,
) -> jax.Array:  # fmt: skip
    """Attention of one token a row to itself and to the cache before it, with one softmax in float32 over both.

    Args:
      q: [B, N, H].
      own: the tokens' keys and values, [B, K, 1, H].
      held: the cache's, [B, K, S, H].
      positions: [B].
      window: keys that a query sees, including itself; 0 for all before it.
      least: queries of a key head that are multiplied at least; fewer are padded, as in `weights.matrix_einsum`.

    Returns:
      [B, N, H].
    """
    (k, v), (keys, values) = own, held
    B, N, H = q.shape
    K, S = keys.shape[1:3]
    G = N // K
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    q = jnp.pad(q.reshape(B, K, G, H), ((0, 0), (0, 0), (0, max(0, least - G)), (0, 0)))
    at = jnp.arange(S)[None, :]
    seen = at < positions[:, None]
    if window:
        seen &= positions[:, None] - at < window
    before = jnp.where(seen[:, None, None], product("bkgh,bksh->bkgs", q, keys) * H**-0.5, _NEVER)
    itself = product("bkgh,bksh->bkgs", q, k) * H**-0.5
    most = jnp.maximum(jnp.max(before, axis=-1, keepdims=True), itself)
    before, itself = jnp.exp(before - most), jnp.exp(itself - most)
    total = jnp.sum(before, axis=-1, keepdims=True) + itself
    out = product("bkgs,bksh->bkgh", before.astype(values.dtype), values) + itself * v.astype(jnp.float32)
    return (out / total)[:, :, :G].astype(v.dtype).reshape(B, N, H)


def written(cache: Cache, new: Cache, starts: jax.Array, layout: Layout) -> Cache:
    """Writes keys and values of all rows into a cache, in place where the cache is donated.

    Args:
      cache: of B rows.
      new: the rows' own tokens', from `cached_hidden`.
      starts: [B], each row's position of the first one.
      layout: of both.
    """
    axis = layout.rows_axis

    def write(cache: Cache, new: Cache, starts: jax.Array) -> Cache:
        def one(row: jax.Array, cache: Cache) -> Cache:
            def put(into: jax.Array, all_rows: jax.Array) -> jax.Array:
                part = jax.lax.dynamic_slice_in_dim(all_rows, row, 1, axis).astype(into.dtype)
                at = [jnp.int32(0)] * into.ndim
                at[axis], at[-2] = row, starts[row]
                return jax.lax.dynamic_update_slice(into, part, at)

            return jax.tree.map(put, cache, new)

        return jax.lax.fori_loop(0, len(starts), one, cache)

    return _by_device(write, layout, layout.cache_spec, PartitionSpec(rules.BATCH_AXES))(cache, new, starts)


def with_row(cache: Cache, new: Cache, row: jax.Array, layout: Layout) -> Cache:
    """Writes the keys and values of one prompt to the beginning of a row.

    Args:
      cache: of B rows.
      new: the prompt's, a cache of one row.
      row: [1], the row.
      layout: of both.
    """
    axis, rows = layout.rows_axis, jax.tree.leaves(cache)[0].shape[layout.rows_axis]

    def write(cache: Cache, new: Cache, numbers: jax.Array, row: jax.Array) -> Cache:
        inside = row[0] - numbers[0]  # of this device's rows, if it is among them
        mine = (inside >= 0) & (inside < len(numbers))
        inside = jnp.clip(inside, 0, len(numbers) - 1)

        def put(into: jax.Array, part: jax.Array) -> jax.Array:
            at = [jnp.int32(0)] * into.ndim
            at[axis] = inside
            old = jax.lax.dynamic_slice(into, at, part.shape)
            return jax.lax.dynamic_update_slice(into, jnp.where(mine, part.astype(into.dtype), old), at)

        return jax.tree.map(put, cache, new)

    one = list(layout.cache_spec)
    one[axis] = None
    specs = (PartitionSpec(*one), PartitionSpec(rules.BATCH_AXES), PartitionSpec())
    return _by_device(write, layout, *specs)(cache, new, jnp.arange(rows), row)


def _by_device(function: Any, layout: Layout, *specs: PartitionSpec) -> Any:
    """`function` of a cache and of arrays with `specs`, run by each device on its own part."""
    if layout.mesh is None:
        return function
    return jax.shard_map(
        function, mesh=layout.mesh, in_specs=(layout.cache_spec, *specs), out_specs=layout.cache_spec, check_vma=False
    )
