"""Upcycling as a view: each layer's MLP becomes experts as it is read, in Mixtral's tensors."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint, Origin, Read, row_blocks, tensor_name
from solar_jax.checkpoints.hf_config import model_config
from solar_jax.checkpoints.hf_families import FAMILIES, GRANULARITY, HARMLESS, NORMALISED
from solar_jax.checkpoints.tensor_table import hf_shape, hf_tensors
from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.growth.apply import upcycled_config
from solar_jax.growth.derived import mean_and_deviation, noise
from solar_jax.growth.operators import Upcycling

ROUTER_DEVIATION = 0.02
# Array of experts -> the MLP's that it is made of; of the router, the one whose dtype it has
DENSE = {"experts_gate": "gate_proj", "experts_up": "up_proj", "experts_down": "down_proj", "router": "gate_proj"}


def with_experts(c: Checkpoint, made: Upcycling) -> Checkpoint:
    """Upcycles a dense checkpoint.

    The logits stay the base's where nothing is redrawn or jittered and weights are normalised: a token's experts are
    then equal, and so are a group's router rows, and `down_proj` times the granularity undoes that the group's weight
    is divided among its shards (gate and up are not scaled: SwiGLU is not homogeneous).

    Raises:
      UserError: the model is not of Mixtral's kind.
    """
    cfg = upcycled_config(c.cfg, made)
    places = {name: (path, layer) for name, path, layer in hf_tensors(cfg)}

    def source(name: str) -> str:
        """Returns the base's tensor that a tensor is made of, or has its dtype from."""
        path, layer = places[name]
        array = path.removeprefix("layers/")
        return tensor_name(f"layers/{DENSE[array]}", layer) if array in DENSE else name

    kept = {name for name in places if name in c.shape_of}
    arrays = {name: place[0].removeprefix("layers/") for name, place in places.items() if name not in kept}

    @functools.cache
    def spread(name: str) -> tuple[float, float]:
        return mean_and_deviation(c.read(name, rows) for rows in row_blocks(c.shape_of[name]))

    def read(name: str, rows: slice = slice(None)) -> np.ndarray:
        if name in kept:
            return c.read(name, rows)
        dtype, wanted = c.dtype_of[source(name)], range(hf_shape(places[name][0], cfg)[0])[rows]
        if arrays[name] == "router":
            return _router(name, wanted, cfg).astype(dtype)
        height = cfg.hidden_size if arrays[name] == "experts_down" else cfg.intermediate_size
        parts = []
        for expert in range(wanted.start // height, -(-wanted.stop // height)):
            inside = range(max(wanted.start - expert * height, 0), min(wanted.stop - expert * height, height))
            parts.append(_expert(c.read, source(name), name, arrays[name], expert, inside, cfg, made, spread))
        return np.concatenate(parts).astype(dtype, copy=False)

    def origin(name: str) -> Origin:
        return c.origin(name) if name in kept else (c.origin(source(name)), name, made)

    return dataclasses.replace(
        c,
        hf_config=upcycled_hf_config(c, cfg),
        cfg=cfg,
        shape_of={name: hf_shape(path, cfg) for name, (path, _) in places.items()},
        dtype_of={name: c.dtype_of[source(name)] for name in places},
        read=read,
        entry_of={name: c.entry_of[name] for name in kept if name in c.entry_of},
        origins={name: origin(name) for name in places},
    )


def _router(name: str, rows: range, cfg: ModelConfig) -> np.ndarray:
    """Draws rows of a router [E, D]; those of a virtual group are equal."""
    groups = [row // cfg.expert_granularity for row in rows]
    drawn = noise(name, range(min(groups), max(groups) + 1), cfg.hidden_size, ROUTER_DEVIATION)
    return drawn[[group - min(groups) for group in groups]]


def _expert(
    read: Read, source: str, name: str, array: str, expert: int, rows: range, cfg: ModelConfig, made: Upcycling,
    spread: Callable[[str], tuple[float, float]],
) -> np.ndarray:  # fmt: skip
    """Makes rows of one expert's matrix from its MLP's, in the file's layout."""
    F, down = cfg.intermediate_size, array == "experts_down"
    first = expert % made.granularity * F  # the expert's channels of the MLP
    if down:
        x = read(source, slice(rows.start, rows.stop))[:, first : first + F]
    else:
        x = read(source, slice(first + rows.start, first + rows.stop))
    height = cfg.hidden_size if down else F
    numbers = range(expert * height + rows.start, expert * height + rows.stop)  # of the rows of all experts together
    if made.redrawn:
        mean, deviation = spread(source)
        drawn = (mean + noise(name, numbers, x.shape[1], deviation)).astype(x.dtype)
        mask = redrawn_channels(name, expert, F, made.redrawn)
        x = np.where(mask[None, :] if down else mask[rows.start : rows.stop, None], drawn, x)
    if made.jitter:
        x = (x.astype(np.float32) * (1 + noise(name + " jitter", numbers, x.shape[1], made.jitter))).astype(x.dtype)
    return x * np.asarray(made.granularity, x.dtype) if down and made.granularity > 1 else x


def redrawn_channels(name: str, expert: int, width: int, share: float) -> np.ndarray:
    """Chooses the channels of an expert that are redrawn, the same of its three matrices.

    Args:
      name: HF name of one of the matrices, from which the layer is taken.
      expert: its number.
      width: F.
      share: r.

    Returns:
      Booleans [F], round(r F) of them True.
    """
    layer = name.rpartition(".experts.")[0]
    key = int.from_bytes(hashlib.sha256(f"{layer} {expert}".encode()).digest()[:16], "little")
    chosen = np.random.Generator(np.random.Philox(key=key)).permutation(width)[: round(share * width)]
    mask = np.zeros(width, bool)
    mask[chosen] = True
    return mask


def upcycled_hf_config(c: Checkpoint, cfg: ModelConfig) -> dict[str, Any]:
    """Returns config.json of a dense model that becomes Mixtral's `cfg`."""
    family = FAMILIES["mixtral"]
    known = {*family.defaults, *HARMLESS, "hidden_act", "vocab_size"}
    other = {"use_sliding_window", "max_window_layers", "layer_types", "attention_bias", "mlp_bias"}
    kept = {key: value for key, value in c.hf_config.items() if key in known - other}
    made = kept | {
        "model_type": "mixtral", "architectures": [family.architecture],
        **{key: getattr(cfg, key) for key in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "num_local_experts",
            "num_experts_per_tok",
        )},
        "sliding_window": cfg.sliding_window or None,
    }  # fmt: skip
    if not made.get("rope_parameters"):
        made["rope_theta"] = cfg.rope_theta
    own = {GRANULARITY: cfg.expert_granularity, NORMALISED: cfg.norm_topk_prob}
    made |= {key: value for key, value in own.items() if value != family.defaults[key]}
    found = model_config(made, c.where)
    differ = [f.name for f in dataclasses.fields(cfg) if getattr(found, f.name) != getattr(cfg, f.name)]
    if differ:
        raise UserError(f"{c.where}: {differ[0]} of this model cannot be written into Mixtral's config.json.")
    return made


def why_not_hf(c: Checkpoint) -> str:
    """Returns the sentence that says why a model of experts has no Hugging Face folder; "" if it has one."""
    if c.cfg.expert_granularity > 1:
        key, wanted, found = "granularity", "1", str(c.cfg.expert_granularity)
    elif c.cfg.num_local_experts and not c.cfg.norm_topk_prob:
        key, wanted, found = "routing", "renormalised", "softmax"
    else:
        return ""
    return (
        f"{c.where}: a Hugging Face folder holds experts of growth.{key}={wanted}, found {found}; ours (--to orbax) "
        "holds any."
    )
