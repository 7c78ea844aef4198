"""Weights of projections in int8 with a scale for each output; embedding, head and activations keep their dtype."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from solar_jax.model.llama import Constrain, Einsum
from solar_jax.model.lora import INPUTS
from solar_jax.model.shapes import Params

_MOST = 127


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
    wide = weight.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=axes, keepdims=True) / _MOST, jnp.finfo(jnp.float32).tiny)
    return Int8(jnp.round(wide / scale).astype(jnp.int8), jnp.squeeze(scale, axes))


def quantised(params: Params) -> Params:
    """Returns a state whose projections are `Int8`, symmetric around 0, rounded to the nearest.

    Args:
      params: the stacked state. Its projections are removed from it one by one, so that both are never in memory.
    """
    layers = params["layers"]
    for name, inputs in INPUTS.items():
        layers[f"{name}_proj"] = _quantised(layers.pop(f"{name}_proj"), inputs)
    return params


def with_int8(constrain: Constrain, einsum: Einsum) -> tuple[Constrain, Einsum]:
    """Returns both functions for weights that may be `Int8`."""

    def laid(x: Any, letters: str) -> Any:
        return x if is_int8(x) else constrain(x, letters)

    def multiplied(subscripts: str, x: jax.Array, weight: Any) -> jax.Array:
        if not is_int8(weight):
            return einsum(subscripts, x, weight)
        return (einsum(subscripts, x, weight.values).astype(jnp.float32) * weight.scale).astype(x.dtype)

    return laid, multiplied
