"""Applies a growth layer map to a stacked pytree with one gather over the layer axis."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.growth.derived import fitted, moments
from solar_jax.growth.operators import LayerMap, Upcycling
from solar_jax.model.shapes import Params

# The arrays through which a layer adds to the residual stream; scaled to 0, the layer passes its input through.
SCALED = ("o_proj", "o_bias", "down_proj", "down_bias", "experts_down")
SCALED_NORMS = ("attn_out_norm", "mlp_out_norm")  # instead, where a norm follows, which undoes a scale before it


def is_scaled(name: str, cfg: ModelConfig) -> bool:
    """Returns whether a layer map's scale applies to a layer's array."""
    return name in (SCALED_NORMS if cfg.post_norm else SCALED)


def grow(params: Params, layer_map: LayerMap) -> Params:
    """Grows parameters: layer i becomes source layer layer_map.source[i], or its mean with layer_map.partner[i].

    Args:
      params: the base, with `layers` arrays [n, ...].
      layer_map: a layer map for n layers.

    Returns:
      A tree of the same dtypes whose `layers` arrays are [L, ...]; everything else is the base's.

    Raises:
      ValueError: an array's layer axis is not the layer map's n; or the map asks for noise, which
        `checkpoints.views.grown` makes by the tensors' HF names.
    """
    if layer_map.experts:
        raise ValueError(f"{layer_map.operator} makes experts; grow a checkpoint with views.grown.")
    if any(layer_map.noise):
        raise ValueError(f"{layer_map.operator} draws noise by tensor names; grow a checkpoint with views.grown.")
    source, partner = jnp.array(layer_map.source), jnp.array(layer_map.partner)
    scale = jnp.array(layer_map.scale, jnp.float32)
    scaled = SCALED_NORMS if SCALED_NORMS[0] in params["layers"] else SCALED

    def one(name: str, x: jax.Array) -> jax.Array:
        if x.shape[0] != layer_map.base_layers:
            raise ValueError(f"layers/{name} has {x.shape[0]} layers, the plan is for {layer_map.base_layers}.")
        grown = jnp.take(x, source, axis=0)
        if layer_map.partner != layer_map.source:
            mixed = _mixed(grown, jnp.take(x, partner, axis=0), layer_map.mix, x)
            grown = jnp.where(_per_layer(source == partner, x), grown, mixed.astype(x.dtype))
        if name in scaled and set(layer_map.scale) != {1.0}:
            grown = grown * _per_layer(scale, x).astype(x.dtype)
        return grown

    return params | {"layers": {name: one(name, x) for name, x in params["layers"].items()}}


def _mixed(x: jax.Array, y: jax.Array, mix: str, stack: jax.Array) -> jax.Array:
    """The mixture of layers [L, ...] and their partners in float32; a fit needs the values of the base's `stack`."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    if mix == "mean":
        return (x + y) / 2
    a, b = fitted(moments(lambda i: np.asarray(stack[i]), len(stack)))
    return np.float32(a) * x + np.float32(b) * y


def _per_layer(values: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes [L] to broadcast against `like` [L, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def grown_config(cfg: ModelConfig, layer_map: LayerMap) -> ModelConfig:
    """Returns the config of the grown model; what it says of single layers follows the layer map."""
    still = tuple(i for i, source in enumerate(layer_map.source) if source in cfg.no_rope_layers)
    deeper = dataclasses.replace(cfg, num_hidden_layers=layer_map.layers, no_rope_layers=still)
    return upcycled_config(deeper, layer_map.experts) if layer_map.experts else deeper


def upcycled_config(cfg: ModelConfig, made: Upcycling) -> ModelConfig:
    """Returns the config of a model whose MLPs become experts.

    Raises:
      UserError: the model has what Mixtral's class has not, or its MLP does not split into so many shards.
    """
    plain = ModelConfig()
    for key in (
        "attention_bias", "qk_norm", "no_rope_layers", "mlp_bias", "post_norm", "num_local_experts",
        "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_multiplier",
    ):  # fmt: skip
        if (found := getattr(cfg, key)) != getattr(plain, key):
            raise UserError(f"growth.experts={made.experts} needs a model of Mixtral's kind, found {key}={found!r}.")
    width, rest = divmod(cfg.intermediate_size, made.granularity)
    if rest:
        raise UserError(
            f"growth.granularity={made.granularity} must divide the model's intermediate_size={cfg.intermediate_size}."
        )
    return dataclasses.replace(
        cfg,
        intermediate_size=width,
        num_local_experts=made.experts * made.granularity,
        num_experts_per_tok=made.top_k * made.granularity,
        norm_topk_prob=made.normalised,
        expert_granularity=made.granularity,
    )
