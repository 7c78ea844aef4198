"""Hugging Face `config.json` keys per architecture, to a ModelConfig."""

from typing import Any

from solar_jax.config import ModelConfig
from solar_jax.errors import UserError

# What transformers assumes of a key that config.json leaves out, by `model_type`.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "num_key_value_heads": None,  # as many as heads
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "sliding_window": None,
    },
    "mistral": {
        "num_key_value_heads": 8,
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
    known = FAMILIES[kind] | {k: v for k, v in hf.items() if k in FAMILIES[kind]}
    size = {key: _positive(hf.get(key), int, key, where) for key in SIZES}
    heads = size["num_attention_heads"]
    kv_heads = known["num_key_value_heads"]
    kv_heads = heads if kv_heads is None else _positive(kv_heads, int, "num_key_value_heads", where)
    if heads % kv_heads:
        raise UserError(f"{where}: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}.")
    head_dim = hf.get("head_dim")
    head_dim = size["hidden_size"] // heads if head_dim is None else _positive(head_dim, int, "head_dim", where)
    if head_dim % 2:
        raise UserError(f"{where}: head_dim must be even for rotary embeddings, found {head_dim}.")
    window = known["sliding_window"] if kind == "mistral" else None
    return ModelConfig(
        **size,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_positive(known["max_position_embeddings"], int, "max_position_embeddings", where),
        rope_theta=_rope_theta(hf, known["rope_theta"], where),
        rms_norm_eps=_positive(known["rms_norm_eps"], float, "rms_norm_eps", where),
        tie_word_embeddings=bool(known["tie_word_embeddings"]),
        sliding_window=0 if window is None else _positive(window, int, "sliding_window", where),
    )


def _positive(value: Any, kind: type, key: str, where: str) -> Any:
    """`value` as a positive int or float."""
    if type(value) not in (int, kind) or not value > 0:
        name = "integer" if kind is int else "number"
        raise UserError(f"{where}: {key} must be a positive {name}, found {value!r}.")
    return kind(value)


def _rope_theta(hf: dict[str, Any], default: float, where: str) -> float:
    """The base of the frequencies; older files have `rope_theta`, newer ones `rope_parameters`."""
    theta = default
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{where}: {key} must hold keys, found {rope!r}.")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{where}: {key}.rope_type must be 'default', found {kind!r}.")
        theta = rope.get("rope_theta", theta)
    return _positive(theta, float, "rope_theta", where)


def grown_hf_config(hf: dict[str, Any], layers: int, dtype: str) -> dict[str, Any]:
    """`hf` for a model of `layers` layers stored as `dtype`; every other key as it was."""
    keys = [key for key in ("dtype", "torch_dtype") if key in hf] or ["dtype"]
    return hf | {"num_hidden_layers": layers} | dict.fromkeys(keys, dtype)


def differences(expected: ModelConfig, found: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Keys that `expected` sets and `found` has otherwise, as (expected, found)."""
    if not expected.num_hidden_layers:
        return {}
    return {k: (v, getattr(found, k)) for k, v in vars(expected).items() if v and v != getattr(found, k)}
