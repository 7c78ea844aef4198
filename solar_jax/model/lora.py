"""Low-rank adapters of the layers' projections: names, axes, shapes and first values. Axis letter R is the rank.

The adapter of a projection W is W + s A B with A "q_lora_a", B "q_lora_b" and a scale s; DoRA also has the magnitude of
each output feature, "q_lora_norm" (LoRA: arXiv 2106.09685; rsLoRA: 2312.03732; DoRA: 2402.09353).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from solar_jax.config import LoraConfig, ModelConfig
from solar_jax.errors import UserError
from solar_jax.model.shapes import LAYER_AXES, Params, sizes

INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}  # leading axes of a projection that it sums


def scale(cfg: LoraConfig) -> float:
    """The factor of A B."""
    return cfg.alpha / (math.sqrt(cfg.rank) if cfg.variant == "rslora" else cfg.rank)


def adapter_axes(cfg: LoraConfig) -> dict[str, str]:
    """Axis letters of every array of an adapter, without the layer axis."""
    found = {}
    for name in cfg.targets:
        letters, n = LAYER_AXES[f"{name}_proj"], INPUTS[name]
        found |= {f"{name}_lora_a": letters[:n] + "R", f"{name}_lora_b": "R" + letters[n:]}
        if cfg.variant == "dora":
            found[f"{name}_lora_norm"] = letters[n:]
    return found


def adapter_shapes(cfg: ModelConfig, lora: LoraConfig, layers: int, dtype: str = "float32") -> Params:
    """Abstract arrays of an adapter of so many layers; magnitudes are float32.

    Raises:
      UserError: the model has experts, and the adapter is of a dense MLP.
    """
    size = sizes(cfg) | {"R": lora.rank}
    if cfg.num_local_experts and set(lora.targets) & {"gate", "up", "down"}:
        raise UserError(
            f"config.lora.targets must be among q, k, v, o for a model of experts, found {', '.join(lora.targets)}."
        )
    return {
        name: jax.ShapeDtypeStruct(
            (layers, *(size[x] for x in letters)), jnp.float32 if name.endswith("norm") else jnp.dtype(dtype)
        )
        for name, letters in adapter_axes(lora).items()
    }


def first_adapter(cfg: ModelConfig, lora: LoraConfig, projections: Params, seed: int, dtype: str) -> Params:
    """An adapter that changes nothing: A uniform within 1 / sqrt(inputs), B zero, magnitudes those of W.

    Args:
      cfg: the model.
      lora: the adapter.
      projections: the layers' arrays [layers, ...] that it adapts.
      seed: of A.
      dtype: of A and B.
    """
    out = {}
    layers = next(iter(projections.values())).shape[0]
    for i, (name, s) in enumerate(adapter_shapes(cfg, lora, layers, dtype).items()):
        if name.endswith("_lora_a"):
            bound = 1 / math.sqrt(math.prod(s.shape[1:-1]))
            key = jax.random.fold_in(jax.random.key(seed), i)
            out[name] = jax.random.uniform(key, s.shape, jnp.float32, -bound, bound).astype(s.dtype)
        elif name.endswith("_lora_b"):
            out[name] = jnp.zeros(s.shape, s.dtype)
        else:
            target = name.removesuffix("_lora_norm")
            weight = projections[f"{target}_proj"].astype(jnp.float32)
            out[name] = jnp.sqrt(jnp.sum(weight**2, axis=tuple(range(1, 1 + INPUTS[target]))))
    return out


def norm_of(weight: jax.Array, a: jax.Array, b: jax.Array, inputs: int) -> jax.Array:
    """DoRA's norm of W + A B over the inputs of each output feature of one layer, in float32; B carries the scale."""
    low = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision=jax.lax.Precision.HIGHEST)
    return jnp.sqrt(jnp.sum((weight.astype(jnp.float32) + low) ** 2, axis=tuple(range(inputs))))


def merged_layers(layers: Params, adapter: Params, factor: float, index: Any) -> Params:
    """The layers with an adapter added to their weights: W + factor A B, scaled to DoRA's magnitude where there is one.

    Args:
      layers: the stacked arrays [L, ...].
      adapter: its arrays [adapted layers, ...].
      factor: LoRA's scale.
      index: the layers that are adapted, as numpy indexes them.
    """
    out = dict(layers)
    for name in {key.partition("_lora")[0] for key in adapter}:
        whole = layers[f"{name}_proj"]
        w, a, b = (x.astype(jnp.float32) for x in (whole[index], adapter[f"{name}_lora_a"], adapter[f"{name}_lora_b"]))
        b *= factor
        product = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
        made = w + jax.vmap(product)(a, b)
        if (magnitude := adapter.get(f"{name}_lora_norm")) is not None:
            norm = jax.vmap(functools.partial(norm_of, inputs=INPUTS[name]))(w, a, b)
            made *= (magnitude / norm).reshape(len(a), *(1,) * INPUTS[name], *norm.shape[1:])
        out[f"{name}_proj"] = whole.at[index].set(made.astype(whole.dtype))
    return out
