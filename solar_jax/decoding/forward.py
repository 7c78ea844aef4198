"""The decoder with a cache of keys and values: a prompt at once, then one token a row at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from solar_jax.config import ModelConfig
from solar_jax.model.attention import attention
from solar_jax.model.llama import Block, Constrain, Llama, compute_copy, graph, rms_norm, rotates, scaled, unconstrained
from solar_jax.model.rope import apply_rope, rope_angles
from solar_jax.model.shapes import Params

# Keys and values after rotation: {"k", "v"}, each [L, B, S, K, H], or with unrolled layers a tuple of [B, S, K, H].
Cache = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the layers are held: stacked and scanned, or one by one, which a CPU runs faster."""

    unrolled: bool = False


def empty_cache(cfg: ModelConfig, rows: int, length: int, dtype: Any, layout: Layout) -> Cache:
    """Creates a cache of S = `length` positions for B = `rows` rows."""
    shape = (rows, length, cfg.num_key_value_heads, cfg.head_dim)
    L = cfg.num_hidden_layers
    if layout.unrolled:
        return {name: tuple(jnp.zeros(shape, dtype) for _ in range(L)) for name in "kv"}
    return {name: jnp.zeros((L, *shape), dtype) for name in "kv"}


def cache_bytes(cfg: ModelConfig, rows: int, length: int, dtype: Any) -> int:
    """Returns the bytes of such a cache."""
    return (
        2 * cfg.num_hidden_layers * rows * length * cfg.num_key_value_heads * cfg.head_dim * jnp.dtype(dtype).itemsize
    )


def laid_out(params: Params, cfg: ModelConfig, compute_dtype: Any, layout: Layout) -> Params:
    """Returns parameters as `cached_hidden` takes them: matrices in compute_dtype, layers apart if unrolled."""
    params = compute_copy(params, compute_dtype)
    layers = rotates(params["layers"], cfg)
    if layout.unrolled:
        layers = tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(cfg.num_hidden_layers))
    return params | {"layers": layers}


def cached_hidden(
    cfg: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache, *,
    compute_dtype: Any, constrain: Constrain = unconstrained, layout: Layout = Layout(),
) -> tuple[jax.Array, jax.Array, Cache]:  # fmt: skip
    """Runs tokens of known positions through the model, next to what the cache holds of the tokens before them.

    A token sees the cache's positions up to its own. What lies beyond, such as a prompt's padding, is never seen: it is
    overwritten by the token that comes to stand there before that token looks.

    Args:
      cfg: the architecture.
      params: from `laid_out`.
      tokens: [B, T] integers.
      positions: [B, T] integers below S.
      cache: of rows B and length S.
      compute_dtype: dtype of matmuls and activations.
      constrain: lays out activations and gathered parameters on a mesh.
      layout: as in `laid_out`.

    Returns:
      The final norm's output [B, T, D], the output projection [D, V], and the cache with the tokens.
    """
    rope = rope_angles(positions, cfg)
    rows = jnp.arange(tokens.shape[0])[:, None]

    def merge(layers: Params) -> Llama:
        return nnx.merge(graph(cfg), params | {"layers": layers})

    def mask_of(length: int) -> jax.Array:
        seen = jnp.arange(length)[None, None, :] <= positions[:, :, None]
        if cfg.sliding_window:
            seen &= positions[:, :, None] - jnp.arange(length)[None, None, :] < cfg.sliding_window
        return seen

    def through(x: jax.Array, block: Block, k_cache: jax.Array, v_cache: jax.Array) -> tuple[jax.Array, ...]:
        """One layer; the caches are its own, [B, S, K, H]."""
        new: list[jax.Array] = []

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, rope: Any, _: Any) -> jax.Array:
            new.append(k_cache.at[rows, positions].set(apply_rope(k, rope).astype(k_cache.dtype)))
            new.append(v_cache.at[rows, positions].set(v.astype(v_cache.dtype)))
            return attention(apply_rope(q, rope), new[0], new[1], mask_of(k_cache.shape[1]))

        return block(x, rope, None, constrain, attend), *new

    layers = params["layers"]
    model = merge(layers[0] if layout.unrolled else layers)
    x = constrain(constrain(model.embed[...], ".D")[tokens], "BTD")
    x = scaled(x.astype(compute_dtype), cfg.embedding_multiplier)
    if layout.unrolled:
        filled: list[tuple[jax.Array, jax.Array]] = []
        for i, layer in enumerate(layers):
            x, k, v = through(x, merge(layer).layers, cache["k"][i], cache["v"][i])
            filled.append((k, v))
        cache = {"k": tuple(k for k, _ in filled), "v": tuple(v for _, v in filled)}
    else:

        def body(carry: tuple[jax.Array, Cache], item: tuple[jax.Array, Block]) -> tuple[tuple[jax.Array, Cache], None]:
            # The whole cache is carried, so that it is written in place.
            x, cache = carry
            i, block = item
            own = (jax.lax.dynamic_index_in_dim(cache[name], i, keepdims=False) for name in "kv")
            x, k, v = through(x, block, *own)
            update = jax.lax.dynamic_update_index_in_dim
            return (x, {"k": update(cache["k"], k, i, 0), "v": update(cache["v"], v, i, 0)}), None

        (x, cache), _ = jax.lax.scan(body, (x, cache), (jnp.arange(cfg.num_hidden_layers), model.layers))
    x = scaled(rms_norm(x, model.final_norm[...], cfg.rms_norm_eps), cfg.logits_multiplier)
    return x, model.head(), cache
