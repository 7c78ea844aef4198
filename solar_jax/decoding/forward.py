"""The decoder with a cache of keys and values: a prompt at once, then one token a row at a time.

A forward pass reads the cache and returns the keys and values of its own tokens, which are written behind it for all
layers at once. So the cache is read once a step and never copied.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from solar_jax.config import ModelConfig
from solar_jax.decoding.int8 import is_int8, with_int8
from solar_jax.model.llama import (
    Block,
    Constrain,
    Llama,
    graph,
    plain_einsum,
    rms_norm,
    rotates,
    scaled,
    unconstrained,
    unembed,
)
from solar_jax.model.rope import apply_rope, rope_angles
from solar_jax.model.shapes import Params, is_vector
from solar_jax.parallel import rules

# Keys and values after rotation: {"k", "v"}, each [L, B, K, S, H], or with unrolled layers a tuple of [B, K, S, H].
Cache = dict[str, Any]
Head = dict[str, jax.Array]  # {"embed": [V, D]} where it is tied, else {"lm_head": [D, V]}
_NEVER = jnp.finfo(jnp.float32).min


@dataclasses.dataclass(frozen=True)
class Layout:
    """How layers and cache are held."""

    unrolled: bool = False  # layers one by one, which a CPU runs faster; otherwise stacked and scanned
    mesh: Mesh | None = None  # rows are split over its axes of the batch, key heads over tensor; None: one device

    @property
    def rows_axis(self) -> int:
        """B's place in an array of the cache."""
        return 0 if self.unrolled else 1

    @property
    def cache_spec(self) -> PartitionSpec:
        """How an array of the cache is split."""
        axes = (rules.BATCH_AXES, "tensor", None, None)
        return PartitionSpec(*axes) if self.unrolled else PartitionSpec(None, *axes)


def empty_cache(cfg: ModelConfig, rows: int, length: int, dtype: Any, layout: Layout) -> Cache:
    """Creates a cache of S = `length` positions for B = `rows` rows."""
    shape = (rows, cfg.num_key_value_heads, length, cfg.head_dim)
    L = cfg.num_hidden_layers

    def create() -> Cache:
        if layout.unrolled:
            return {name: tuple(jnp.zeros(shape, dtype) for _ in range(L)) for name in "kv"}
        return {name: jnp.zeros((L, *shape), dtype) for name in "kv"}

    sharding = None if layout.mesh is None else NamedSharding(layout.mesh, layout.cache_spec)
    return jax.jit(create, out_shardings=sharding)()


def cache_bytes(cfg: ModelConfig, rows: int, length: int, dtype: Any) -> int:
    """Returns the bytes of such a cache."""
    return (
        2 * cfg.num_hidden_layers * rows * length * cfg.num_key_value_heads * cfg.head_dim * jnp.dtype(dtype).itemsize
    )


def laid_out(params: Params, cfg: ModelConfig, compute_dtype: Any, layout: Layout) -> Params:
    """Returns parameters as `cached_hidden` takes them: matrices in compute_dtype, layers apart if unrolled."""
    params = jax.tree.map_with_path(
        lambda path, p: p if is_int8(p) or is_vector(path[-1].key) else p.astype(compute_dtype), params, is_leaf=is_int8
    )
    layers = rotates(params["layers"], cfg)
    if layout.unrolled:
        layers = tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(cfg.num_hidden_layers))
    return params | {"layers": layers}


def cached_hidden(
    cfg: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache | None, *,
    compute_dtype: Any, constrain: Constrain = unconstrained, layout: Layout = Layout(),
) -> tuple[jax.Array, Head, Cache]:  # fmt: skip
    """Runs tokens through the model, behind what the cache holds of the tokens before them.

    A token sees the tokens up to itself, and the cache's positions before the first one. What the cache holds beyond,
    such as a prompt's padding, is never seen: it is overwritten by the token that comes to stand there.

    Args:
      cfg: the architecture.
      params: from `laid_out`.
      tokens: [B, T] integers.
      positions: [B, T] integers, ascending by one in a row.
      cache: of B rows; None where the first position is 0 in all of them.
      compute_dtype: dtype of matmuls and activations.
      constrain: lays out activations and gathered parameters on a mesh.
      layout: as in `laid_out`.

    Returns:
      The final norm's output [B, T, D], the output projection, for `projected`, and the tokens' own keys and values: a
      cache of S = T, for `written`.
    """
    rope = rope_angles(positions, cfg)
    constrain, einsum = with_int8(constrain, plain_einsum)

    def merge(layers: Params) -> Llama:
        return nnx.merge(graph(cfg), params | {"layers": layers})

    def through(x: jax.Array, block: Block, *held: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One layer; `held` is its part of the cache."""
        own: list[tuple[jax.Array, jax.Array]] = []

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, rope: Any, _: Any) -> jax.Array:
            own.append((apply_rope(k, rope).swapaxes(1, 2), v.swapaxes(1, 2)))
            return _attention(apply_rope(q, rope), *own[0], held, positions, cfg.sliding_window)

        return block(x, rope, None, constrain, attend, einsum), *own[0]

    layers = params["layers"]
    model = merge(layers[0] if layout.unrolled else layers)
    x = constrain(constrain(model.embed[...], ".D")[tokens], "BTD")
    x = scaled(x.astype(compute_dtype), cfg.embedding_multiplier)
    if layout.unrolled:
        own = {"k": [], "v": []}
        for i, layer in enumerate(layers):
            held = () if cache is None else (cache["k"][i], cache["v"][i])
            x, k, v = through(x, merge(layer).layers, *held)
            own["k"].append(k)
            own["v"].append(v)
        new: Cache = {name: tuple(parts) for name, parts in own.items()}
    else:

        def body(x: jax.Array, item: tuple[Any, ...]) -> tuple[jax.Array, Cache]:
            x, k, v = through(x, *item)
            return x, {"k": k, "v": v}

        held = () if cache is None else (cache["k"], cache["v"])
        x, new = jax.lax.scan(body, x, (model.layers, *held))
    x = scaled(rms_norm(x, model.final_norm[...], cfg.rms_norm_eps), cfg.logits_multiplier)
    return x, {"embed": model.embed[...]} if cfg.tie_word_embeddings else {"lm_head": model.lm_head[...]}, new


def projected(x: jax.Array, head: Head) -> jax.Array:
    """Projects to logits: [B, D] -> float32 [B, V]. A tied embedding is read as it lies, [V, D]."""
    if "lm_head" in head:
        return unembed(x, head["lm_head"])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("bd,vd->bv", x, head["embed"], precision=precision, preferred_element_type=jnp.float32)


def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, held: tuple[jax.Array, ...], positions: jax.Array, window: int
) -> jax.Array:
    """Attention to the tokens' own keys and to those of the cache, with one softmax in float32 over both.

    Args:
      q: [B, T, N, H].
      k, v: [B, K, T, H].
      held: the cache's keys and values [B, K, S, H], or nothing.
      positions: [B, T].
      window: keys that a query sees, including itself; 0 for all before it.

    Returns:
      [B, T, N, H].
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)

    def scores(keys: jax.Array, at: jax.Array, end: jax.Array) -> jax.Array:
        """Scores [B, K, N / K, T, S] of keys at positions `at` [B or 1, 1, S], seen up to `end` [B, T or 1, 1]."""
        found = jnp.einsum("bkmh,bksh->bkms", q, keys, precision=precision, preferred_element_type=jnp.float32)
        seen = at <= end
        if window:
            seen &= positions[:, :, None] - at < window
        return jnp.where(seen[:, None, None], (found * H**-0.5).reshape(B, K, N // K, T, -1), _NEVER)

    parts = [(scores(k, positions[:, None, :], positions[:, :, None]), v)]
    if held:
        before = jnp.arange(held[0].shape[2])[None, None, :]
        parts.append((scores(held[0], before, positions[:, :1, None] - 1), held[1]))
    most = jnp.max(jnp.stack([jnp.max(found, axis=-1) for found, _ in parts]), axis=0)[..., None]
    weights = [jnp.exp(found - most) for found, _ in parts]
    total = sum((jnp.sum(weight, axis=-1) for weight in weights), jnp.zeros((), jnp.float32))
    out = jnp.zeros((), jnp.float32)
    for weight, (_, values) in zip(weights, parts, strict=True):
        out += jnp.einsum(
            "bkms,bksh->bkmh", weight.reshape(B, K, -1, weight.shape[-1]).astype(values.dtype), values,
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
    out = (out.reshape(B, K, N // K, T, H) / total[..., None]).astype(v.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


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
