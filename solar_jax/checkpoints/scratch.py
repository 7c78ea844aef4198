"""Models from scratch: SRC `scratch` is a new model of a config's shape, with the tokenizer of another checkpoint."""

import dataclasses
import math

import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.find import is_scratch, tokenizer_source
from solar_jax.checkpoints.hf_config import model_config
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tensor_table import hf_shape, hf_tensors
from solar_jax.config import ShapeConfig
from solar_jax.errors import UserError
from solar_jax.growth.derived import noise
from solar_jax.model.shapes import is_vector

_DEVIATION = 0.02  # of matrices (HF `initializer_range`)
_DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def open_source(source: str, shape: ShapeConfig, seed: int) -> Checkpoint:
    """Opens what a run starts from: a checkpoint, or a new model.

    Args:
      source: SRC; `scratch` takes SmolLM2's tokenizer, `scratch:SRC` that of SRC.
      shape: of a new model; a checkpoint has its own.
      seed: of a new model's weights.

    Raises:
      UserError: bad source, or a shape with sizes missing.
    """
    return _new_model(source, shape, seed) if is_scratch(source) else open_checkpoint(source)


def _new_model(source: str, shape: ShapeConfig, seed: int) -> Checkpoint:
    """A plain Llama whose values are drawn as they are read: normal matrices of deviation 0.02, norms of 1."""
    for key in _NEEDED:
        if not getattr(shape, key):
            raise UserError(f"config.source={source!r} needs config.model.{key}, the new model's, found 0.")
    donor = open_checkpoint(tokenizer_source(source))
    kept = {k: v for k, v in donor.hf_config.items() if k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {k: v for k, v in dataclasses.asdict(shape).items() if v and k not in ("rope_theta", "sliding_window")}
    if shape.sliding_window:
        raise UserError(f"config.source={source!r} has no window: config.model.sliding_window must be 0.")
    hf_config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
        "vocab_size": donor.cfg.vocab_size, "max_position_embeddings": donor.cfg.max_position_embeddings,
        "rms_norm_eps": _DEFAULTS["rms_norm_eps"], "rope_theta": shape.rope_theta or _DEFAULTS["rope_theta"],
        "tie_word_embeddings": False, "dtype": "float32", **kept, **sizes,
    }  # fmt: skip
    cfg = model_config(hf_config, source)
    if cfg.vocab_size < donor.cfg.vocab_size:
        raise UserError(
            f"config.model.vocab_size={cfg.vocab_size} is less than the {donor.cfg.vocab_size} of {donor.where}."
        )
    shapes = {name: hf_shape(path, cfg) for name, path, _ in hf_tensors(cfg)}
    vectors = {name for name, path, _ in hf_tensors(cfg) if is_vector(path.rpartition("/")[2])}

    def read(name: str, rows: slice = slice(None)) -> np.ndarray:
        if name in vectors:
            return np.ones(shapes[name], np.float32)[rows]
        height, *width = shapes[name]
        return noise(f"{seed}/{name}", range(height)[rows], math.prod(width), _DEVIATION)

    return Checkpoint(
        where=source,
        hf_config=hf_config,
        cfg=cfg,
        companions=donor.companions,
        shape_of=shapes,
        dtype_of=dict.fromkeys(shapes, np.dtype(np.float32)),
        read=read,
        origins={name: (source, seed, name) for name in shapes},
    )
