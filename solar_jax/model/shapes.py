"""Names, axes and shapes of the model's arrays, each stated once: sharding and conversion read them here."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from solar_jax.config import ModelConfig

Params = dict[str, Any]  # {"embed", "layers": {...}, "final_norm", "lm_head"}, arrays or anything shaped like them


LAYER_AXES = {
    "attn_norm": "D",
    "q_proj": "DNH",
    "k_proj": "DKH",
    "v_proj": "DKH",
    "o_proj": "NHD",
    "q_bias": "NH",
    "k_bias": "KH",
    "v_bias": "KH",
    "o_bias": "D",
    "q_norm": "H",
    "k_norm": "H",
    "attn_out_norm": "D",
    "mlp_norm": "D",
    "gate_proj": "DF",
    "up_proj": "DF",
    "down_proj": "FD",
    "router": "DE",
    "experts_gate": "EDF",
    "experts_up": "EDF",
    "experts_down": "EFD",
    "gate_bias": "F",
    "up_bias": "F",
    "down_bias": "D",
    "mlp_out_norm": "D",
}


# Arrays of `LAYER_AXES` that only some architectures have -> the condition on the config.
OPTIONAL: dict[str, Callable[[ModelConfig], bool]] = {
    "q_bias": lambda cfg: "q" in cfg.attention_bias,
    "k_bias": lambda cfg: "k" in cfg.attention_bias,
    "v_bias": lambda cfg: "v" in cfg.attention_bias,
    "o_bias": lambda cfg: "o" in cfg.attention_bias,
    "q_norm": lambda cfg: cfg.qk_norm,
    "k_norm": lambda cfg: cfg.qk_norm,
    "attn_out_norm": lambda cfg: cfg.post_norm,
    "mlp_out_norm": lambda cfg: cfg.post_norm,
    "gate_proj": lambda cfg: not cfg.num_local_experts,
    "up_proj": lambda cfg: not cfg.num_local_experts,
    "down_proj": lambda cfg: not cfg.num_local_experts,
    "router": lambda cfg: cfg.num_local_experts > 0,
    "experts_gate": lambda cfg: cfg.num_local_experts > 0,
    "experts_up": lambda cfg: cfg.num_local_experts > 0,
    "experts_down": lambda cfg: cfg.num_local_experts > 0,
    "gate_bias": lambda cfg: cfg.mlp_bias,
    "up_bias": lambda cfg: cfg.mlp_bias,
    "down_bias": lambda cfg: cfg.mlp_bias,
}


def layer_axes(cfg: ModelConfig) -> dict[str, str]:
    """Returns the entries of `LAYER_AXES` that a model of `cfg` has."""
    return {name: letters for name, letters in LAYER_AXES.items() if name not in OPTIONAL or OPTIONAL[name](cfg)}


def is_vector(name: str) -> bool:
    """Returns whether an array is a norm scale or a bias, which stay float32 and are not decayed."""
    return name.endswith(("norm", "bias"))


def param_axes(cfg: ModelConfig) -> Params:
    """Returns the axis letters of every array of the state, as a tree of strings."""
    tree: Params = {"embed": "VD", "layers": {k: "L" + v for k, v in layer_axes(cfg).items()}, "final_norm": "D"}
    return tree if cfg.tie_word_embeddings else tree | {"lm_head": "DV"}


def sizes(cfg: ModelConfig) -> dict[str, int]:
    """Returns the size of each axis letter."""
    return {
        "V": cfg.vocab_size,
        "D": cfg.hidden_size,
        "F": cfg.intermediate_size,
        "L": cfg.num_hidden_layers,
        "N": cfg.num_attention_heads,
        "K": cfg.num_key_value_heads,
        "H": cfg.head_dim,
        "E": cfg.num_local_experts,
    }


def size(cfg: ModelConfig, letters: str) -> int:
    """Number of elements of an array with these axes."""
    return math.prod(sizes(cfg)[letter] for letter in letters)


def param_shapes(cfg: ModelConfig, weights: str = "float32") -> Params:
    """Returns the state as a tree of `jax.ShapeDtypeStruct`: matrices of dtype `weights`, vectors float32."""
    size = sizes(cfg)

    def one(path: Any, letters: str) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if is_vector(path[-1].key) else jnp.dtype(weights)
        return jax.ShapeDtypeStruct(tuple(size[x] for x in letters), dtype)

    return jax.tree.map_with_path(one, param_axes(cfg))


@functools.cache  # the planner calls it repeatedly
def parameter_count(cfg: ModelConfig) -> int:
    return sum(s.size for s in jax.tree.leaves(param_shapes(cfg)))
