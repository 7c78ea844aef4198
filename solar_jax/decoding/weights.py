"""Weights as decoding reads them: each projection a matrix, in the compute dtype or in int8 with scales."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from solar_jax.config import ModelConfig
from solar_jax.model.llama import rotates
from solar_jax.model.lora import INPUTS
from solar_jax.model.matmul import Einsum, plain_einsum
from solar_jax.model.quantised import narrow_scale, narrow_values
from solar_jax.model.shapes import Params, is_vector, sizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A projection's weight, `values` x `scale`; stands in an array's place until it is multiplied."""

    values: jax.Array  # int8 [L, inputs, outputs]
    scale: jax.Array  # float32 [L, outputs]

    def __getitem__(self, _: Any) -> "Int8":
        """Stands for `weight[...]`, by which a layer reads its arrays."""
        return self


def is_int8(x: Any) -> bool:
    return isinstance(x, Int8)


@functools.partial(jax.jit, static_argnums=1)
def _quantised(weight: jax.Array, inputs: int) -> Int8:
    axes = tuple(range(1, 1 + inputs))
    scale = narrow_scale(weight, axes, jnp.int8)
    return Int8(narrow_values(weight, jnp.expand_dims(scale, axes), jnp.int8), scale)


def quantised(params: Params) -> Params:
    """Returns a state whose projections are `Int8`, symmetric around 0, rounded to the nearest.

    Args:
      params: the stacked state. Its projections are removed from it one by one, so that both are never in memory.
    """
    layers = params["layers"]
    for name, inputs in INPUTS.items():
        layers[f"{name}_proj"] = _quantised(layers.pop(f"{name}_proj"), inputs)
    return params


def laid_out(params: Params, cfg: ModelConfig, compute_dtype: Any) -> Params:
    """Returns parameters as `forward.cached_hidden` takes them: layers apart, so that they can be fetched ahead.

    Args:
      params: the stacked state, or a quantised one.
      cfg: the architecture.
      compute_dtype: dtype of matrices that are not in int8.
    """
    params = jax.tree.map_with_path(
        lambda path, p: p if is_int8(p) or is_vector(path[-1].key) else p.astype(compute_dtype), params, is_leaf=is_int8
    )
    layers = rotates(params["layers"], cfg)
    for name, inputs in INPUTS.items():
        if f"{name}_proj" not in layers:  # experts are multiplied in groups, as they are
            continue
        layers = layers | {f"{name}_proj": _matrix(layers[f"{name}_proj"], inputs)}
    apart = tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(cfg.num_hidden_layers))
    return params | {"layers": apart}


def _matrix(weight: Any, inputs: int) -> Any:
    """[L, *inputs, *outputs] -> [L, inputs, outputs], which a TPU multiplies by as it lies."""
    if is_int8(weight):
        return Int8(_matrix(weight.values, inputs), weight.scale.reshape(len(weight.scale), -1))
    return weight.reshape(len(weight), math.prod(weight.shape[1 : 1 + inputs]), -1)


def matrix_einsum(cfg: ModelConfig, least: int) -> Einsum:
    """An einsum of activations and a weight from `laid_out`, by the subscripts that the whole weight would have.

    Args:
      cfg: the architecture.
      least: rows that are multiplied at least; fewer are padded, as a TPU's matrix unit has no use for one row alone.
    """
    size = {letter.lower(): n for letter, n in sizes(cfg).items()}

    def multiplied(subscripts: str, x: jax.Array, weight: Any) -> jax.Array:
        ours, theirs = subscripts.split("->")[0].split(",")
        summed = sum(letter in ours for letter in theirs)
        flat = x.reshape(*x.shape[:-summed], -1)
        y = padded_product(flat, weight.values if is_int8(weight) else weight, least)
        if is_int8(weight):
            y = (y.astype(jnp.float32) * weight.scale).astype(y.dtype)
        return y.reshape(*x.shape[:-summed], *(size[letter] for letter in theirs[summed:]))

    return multiplied


def padded_product(x: jax.Array, weight: jax.Array, least: int) -> jax.Array:
    """[B, T, I] x [I, O] -> [B, T, O] of at least so many rows, in x's dtype."""
    B, T, _ = x.shape
    if least <= B * T:
        return plain_einsum("bti,io->bto", x, weight)
    rows = jnp.pad(x.reshape(B * T, -1), ((0, least - B * T), (0, 0)))
    return plain_einsum("bi,io->bo", rows, weight)[: B * T].reshape(B, T, -1)
