"""Converts Hugging Face `config.json` per architecture to a ModelConfig, and back to config.json for a grown model.

Each key is read, restricted to the values that the model computes, or known not to affect the maths. Any other key with
a value is rejected: ignoring it would give a different model from the one that was trained.
"""

from collections.abc import Sequence
from typing import Any

from solar_jax.checkpoints.hf_families import (
    FAMILIES,
    FIXED,
    GRANULARITY,
    HARMLESS,
    NORMALISED,
    SIZES,
    Family,
    depth_keys,
)
from solar_jax.checkpoints.hf_keys import one_of, positive, shown, shown_key
from solar_jax.checkpoints.hf_rope import rope_keys
from solar_jax.config import ModelConfig, ShapeConfig
from solar_jax.errors import UserError

MOST_LAYERS = 1 << 20  # a config may claim a billion
PER_LAYER = ("layer_types", "no_rope_layers")  # keys that list one value per layer


def model_config(hf: dict[str, Any], where: str) -> ModelConfig:
    """Parses `hf`, the content of config.json, into a ModelConfig.

    Args:
      hf: HF config keys.
      where: the file name, for messages.

    Raises:
      UserError: an architecture, key or value is not supported, or a size is missing.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{where}: model_type must be one of {', '.join(FAMILIES)}, found {shown(kind)}.")
    family = FAMILIES[kind]
    hf = _usual(hf, family, where)
    _check_keys(hf, family, where)
    read = set(family.defaults) - set(family.fixed) - family.ignored
    known = family.defaults | {key: value for key, value in hf.items() if key in read}
    size = {key: positive(hf.get(key), int, key, where) for key in SIZES}
    heads = size["num_attention_heads"]
    kv_heads = known["num_key_value_heads"]
    kv_heads = heads if kv_heads is None else positive(kv_heads, int, "num_key_value_heads", where)
    if heads % kv_heads:
        raise UserError(f"{where}: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}.")
    attention_bias = family.bias[one_of(known["attention_bias"], tuple(family.bias), "attention_bias", where)]
    if one_of(known.get("attention_out_bias"), (False, True), "attention_out_bias", where):
        attention_bias += "o"
    mlp_bias = one_of(known["mlp_bias"], (False, True), "mlp_bias", where)
    if kind == "internlm3" and mlp_bias != bool(attention_bias):
        raise UserError(f"{where}: bias must equal qkv_bias={bool(attention_bias)}, found {mlp_bias}.")
    positions = positive(known["max_position_embeddings"], int, "max_position_embeddings", where)
    return ModelConfig(
        **size,
        num_key_value_heads=kv_heads,
        head_dim=_head_dim(known["head_dim"], family, size["hidden_size"], heads, where),
        max_position_embeddings=positions,
        rms_norm_eps=positive(known["rms_norm_eps"], float, "rms_norm_eps", where),
        tie_word_embeddings=one_of(known["tie_word_embeddings"], (False, True), "tie_word_embeddings", where),
        sliding_window=_window(known, size["num_hidden_layers"], where),
        attention_bias=attention_bias,
        qk_norm=family.qk_norm,
        no_rope_layers=tuple(i for i, rotates in enumerate(_rotates(known, size, where)) if not rotates),
        mlp_bias=mlp_bias,
        post_norm=one_of(known.get("use_post_norm", False), (False, True), "use_post_norm", where),
        **_experts(known, where),
        **(_multipliers(known, family, where) | rope_keys(known, hf.get("rope_theta") is not None, positions, where)),
    )


def _usual(hf: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Returns config.json under the usual keys, where a family has names of its own for some."""
    usual = {key: value for key, value in hf.items() if key not in family.aliases}
    for own, key in family.aliases.items():
        if own in hf and usual.setdefault(key, hf[own]) != hf[own]:
            raise UserError(f"{where}: {own}={shown(hf[own])} contradicts {key}={shown(usual[key])}.")
    return usual


def _rotates(known: dict[str, Any], size: dict[str, int], where: str) -> list[int]:
    """Returns for each layer 1 if it rotates queries and keys, else 0 (HF `no_rope_layers`, in spite of its name)."""
    layers = size["num_hidden_layers"]
    if "no_rope_layers" not in known:
        return []
    found = known["no_rope_layers"]
    if found is None:
        every = positive(known["no_rope_layer_interval"], int, "no_rope_layer_interval", where)
        return [int((i + 1) % every != 0) for i in range(min(layers, MOST_LAYERS))]
    if not isinstance(found, list) or len(found) < layers or any(x not in (0, 1) for x in found):
        raise UserError(f"{where}: no_rope_layers must list 0 or 1 for {layers} layers, found {shown(found)}.")
    return found[:layers]


def _multipliers(known: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Returns ModelConfig's multipliers; one that changes nothing is 0."""
    found = {}
    for key, (field, power) in family.multipliers.items():
        if known[key] is not None:
            value = positive(known[key], float, key, where) ** power
            found[field] = 0.0 if value == 1.0 and field != "attention_multiplier" else value
    return found


def _experts(known: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns ModelConfig's fields of experts; {} for a family without."""
    if "num_local_experts" not in known:
        return {}
    keys = ("num_local_experts", "num_experts_per_tok", GRANULARITY)
    experts, chosen, granularity = (positive(known[key], int, key, where) for key in keys)
    if chosen > experts or experts % granularity or chosen % granularity:
        raise UserError(
            f"{where}: num_experts_per_tok={chosen} must be at most num_local_experts={experts}, and both multiples of "
            f"{GRANULARITY}={granularity}."
        )
    return {
        "num_local_experts": experts, "num_experts_per_tok": chosen, "expert_granularity": granularity,
        "norm_topk_prob": one_of(known[NORMALISED], (True, False), NORMALISED, where),
    }  # fmt: skip


def _check_keys(hf: dict[str, Any], family: Family, where: str) -> None:
    """Raises a UserError for a key that asks for something the model does not compute."""
    found, names = hf.get("architectures"), (family.architecture, *family.architectures)
    if found and found not in [[name] for name in names]:
        expected = " or ".join(f"[{name!r}]" for name in names)
        raise UserError(f"{where}: architectures must be {expected}, found {shown(found)}.")
    if quantised := hf.get("quantization_config"):
        raise UserError(f"{where}: quantization_config must be absent, found {shown(quantised)}; dequantise it first.")
    fixed = FIXED | family.fixed
    known = {*SIZES, *family.defaults, *family.ignored, *HARMLESS}
    for key, value in hf.items():
        if key in fixed:
            if value is not None and value not in fixed[key]:
                raise UserError(f"{where}: {key} must be {fixed[key][0]!r}, found {shown(value)}.")
        elif key not in known and value is not None and value is not False and value != {} and value != []:
            raise UserError(f"{where}: the key {shown_key(key)} is not supported, found {shown(value)}.")


def _head_dim(found: Any, family: Family, hidden_size: int, heads: int, where: str) -> int:
    """Returns H: as in config.json, or D / N where the family may omit it."""
    if found is None and family.defaults["head_dim"] is None:
        if hidden_size % heads:
            raise UserError(f"{where}: num_attention_heads={heads} must divide hidden_size={hidden_size}.")
        head_dim = hidden_size // heads
    else:
        head_dim = positive(found, int, "head_dim", where)
    if head_dim % 2:
        raise UserError(f"{where}: head_dim must be even for rotary embeddings, found {head_dim}.")
    return head_dim


def _window(known: dict[str, Any], layers: int, where: str) -> int:
    """Returns the sliding window of all layers, 0 for none; a window on only some layers is rejected."""
    used = one_of(known["use_sliding_window"], (False, True), "use_sliding_window", where)
    window = known["sliding_window"] if used else None
    window = 0 if window is None else positive(window, int, "sliding_window", where)
    expected, types = "sliding_attention" if window else "full_attention", known["layer_types"]
    if types is None:
        first = known["max_window_layers"]
        if window and first != 0:
            raise UserError(
                f"{where}: max_window_layers must be 0, so that sliding_window={window} applies to every layer, "
                f"found {shown(first)}."
            )
    elif not isinstance(types, list) or len(types) != layers:
        found = f"{len(types)} entries" if isinstance(types, list) else shown(types)
        raise UserError(f"{where}: layer_types must list num_hidden_layers={layers} entries, found {found}.")
    elif other := [(i, t) for i, t in enumerate(types) if t != expected]:
        i, found = other[0]
        raise UserError(
            f"{where}: layer_types must be {expected!r} for every layer where the sliding_window in use is "
            f"{window or None}, found {shown(found)} for layer {i}."
        )
    return window


def grown_hf_config(hf: dict[str, Any], source: Sequence[int]) -> dict[str, Any]:
    """HF config keys of a model whose layer i is the base's layer source[i]; every other key as in `hf`."""
    grown = hf | dict.fromkeys(depth_keys(hf), len(source))
    for key in PER_LAYER:
        if isinstance(values := hf.get(key), list):
            grown[key] = [values[i] for i in source]
    if hf.get("model_type") == "smollm3" and not hf.get("no_rope_layers"):
        every = hf.get("no_rope_layer_interval") or FAMILIES["smollm3"].defaults["no_rope_layer_interval"]
        grown["no_rope_layers"] = [int((i + 1) % every != 0) for i in source]
    return grown


def with_dtype(hf: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """HF config keys of a model stored in `dtype`; None leaves what `hf` says of it."""
    if dtype is None:
        return hf
    keys = [key for key in ("dtype", "torch_dtype") if key in hf] or ["dtype"]
    return hf | dict.fromkeys(keys, dtype)


def differences(expected: ShapeConfig, found: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Returns keys that `expected` sets and that differ in `found`, as (expected, found)."""
    if not expected.num_hidden_layers:
        return {}
    return {k: (v, getattr(found, k)) for k, v in vars(expected).items() if v and v != getattr(found, k)}
