"""A growth plan applied to a stacked pytree: one gather over the layer axis."""

import dataclasses

import jax
import jax.numpy as jnp

from solar_jax.config import ModelConfig
from solar_jax.growth.operators import GrowthPlan
from solar_jax.model.llama import Params

# The arrays by which a layer adds to the residual stream; scaled to 0, the layer passes its input on.
SCALED = ("o_proj", "o_bias", "down_proj")


def grow(params: Params, plan: GrowthPlan) -> Params:
    """The grown parameters: layer i is source layer plan.source[i], or its mean with plan.partner[i].

    Args:
      params: the base, its `layers` arrays [n, ...].
      plan: made for n layers.

    Returns:
      A tree of the same dtypes whose `layers` arrays are [L, ...]; everything else is the base's.

    Raises:
      ValueError: an array's layer axis is not the plan's n.
    """
    source, partner = jnp.array(plan.source), jnp.array(plan.partner)
    scale = jnp.array(plan.scale, jnp.float32)

    def one(name: str, x: jax.Array) -> jax.Array:
        if x.shape[0] != plan.base_layers:
            raise ValueError(f"layers/{name} has {x.shape[0]} layers, the plan is for {plan.base_layers}.")
        grown = jnp.take(x, source, axis=0)
        if plan.partner != plan.source:
            mean = (grown.astype(jnp.float32) + jnp.take(x, partner, axis=0).astype(jnp.float32)) / 2
            grown = jnp.where(_per_layer(source == partner, x), grown, mean.astype(x.dtype))
        if name in SCALED and set(plan.scale) != {1.0}:
            grown = grown * _per_layer(scale, x).astype(x.dtype)
        return grown

    return params | {"layers": {name: one(name, x) for name, x in params["layers"].items()}}


def _per_layer(values: jax.Array, like: jax.Array) -> jax.Array:
    """[L] shaped to broadcast against `like` [L, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def grown_config(cfg: ModelConfig, plan: GrowthPlan) -> ModelConfig:
    return dataclasses.replace(cfg, num_hidden_layers=plan.layers)
