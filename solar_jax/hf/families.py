"""Hugging Face `config.json` keys per architecture, to a ModelConfig."""

from typing import Any

from solar_jax.config import ModelConfig
from solar_jax.errors import UserError

# What transformers assumes of a key that config.json leaves out, by `model_type`.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "sliding_window": None,
    },
    "mistral": {
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    },
}

# Keys that change the maths, and the only values of them that the model computes; absent counts as the first.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
}

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def model_config(hf: dict[str, Any], where: str) -> ModelConfig:
    """The architecture that `hf`, the content of config.json, describes.

    Args:
      hf: HF config keys.
      where: the file, for messages.

    Raises:
      UserError: an architecture or a key's value that the model does not compute, or a size that is missing.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type must be one of {', '.join(FAMILIES)}, found {kind!r}.")
    for key, allowed in FIXED.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where}: {key} must be {allowed[0]!r}, found {hf[key]!r}.")
    for key in SIZES:
        if type(hf.get(key)) is not int or hf[key] < 1:
            raise UserError(f"{where}: {key} must be a positive integer, found {hf.get(key)!r}.")
    known = FAMILIES[kind] | {k: v for k, v in hf.items() if k in FAMILIES[kind]}
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UserError(f"{where}: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}.")
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    if head_dim % 2:
        raise UserError(f"{where}: head_dim must be even for rotary embeddings, found {head_dim}.")
    return ModelConfig(
        **{key: hf[key] for key in SIZES},
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=int(known["max_position_embeddings"]),
        rope_theta=_rope_theta(hf, known["rope_theta"], where),
        rms_norm_eps=float(known["rms_norm_eps"]),
        tie_word_embeddings=bool(known["tie_word_embeddings"]),
        sliding_window=(known["sliding_window"] or 0) if kind == "mistral" else 0,
    )


def _rope_theta(hf: dict[str, Any], default: float, where: str) -> float:
    """The base of the frequencies; older files have `rope_theta`, newer ones `rope_parameters`."""
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{where}: rope_parameters must hold keys, found {scaling!r}.")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise UserError(f"{where}: rope scaling must be 'default', found {kind!r}.")
    return float(scaling.get("rope_theta", default))


def grown_hf_config(hf: dict[str, Any], layers: int, dtype: str) -> dict[str, Any]:
    """`hf` for a model of `layers` layers stored as `dtype`; every other key as it was."""
    key = "torch_dtype" if "torch_dtype" in hf else "dtype"
    return hf | {"num_hidden_layers": layers, key: dtype}


def differences(expected: ModelConfig, found: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Keys that `expected` sets and `found` has otherwise, as (expected, found)."""
    if not expected.num_hidden_layers:
        return {}
    return {k: (v, getattr(found, k)) for k, v in vars(expected).items() if v and v != getattr(found, k)}
