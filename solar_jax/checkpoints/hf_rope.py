"""Rope keys of config.json, in the style of every generation of transformers, as ModelConfig's."""

import math
from typing import Any

from solar_jax.checkpoints.hf_keys import one_of, positive, shown, shown_key
from solar_jax.errors import UserError

# rope type -> (its parameters, those it may have besides); other types, and other keys with a value, are rejected
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),  # which has no effect
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def rope_keys(known: dict[str, Any], theta_given: bool, positions: int, where: str) -> dict[str, Any]:
    """ModelConfig's rope keys; older files have `rope_theta` and `rope_scaling`, newer ones `rope_parameters`."""
    found = {}
    for key in ("rope_parameters", "rope_scaling"):
        if known[key]:
            found[key] = _rope_dict(known[key], known["rope_theta"], theta_given, positions, key, where)
    if len({tuple(sorted(rope.items())) for rope in found.values()}) > 1:
        raise UserError(
            f"{where}: rope_scaling and rope_parameters must agree, found {shown(known['rope_scaling'])} "
            f"and {shown(known['rope_parameters'])}."
        )
    for rope in found.values():
        return rope
    return {"rope_theta": positive(known["rope_theta"], float, "rope_theta", where)}


def _rope_dict(rope: Any, theta: Any, theta_given: bool, positions: int, key: str, where: str) -> dict[str, Any]:
    """Returns ModelConfig's rope keys from one `rope_scaling` or `rope_parameters`."""
    if not isinstance(rope, dict):
        raise UserError(f"{where}: {key} must be a JSON object, found {shown(rope)}.")
    kinds = {name: rope[name] for name in ("rope_type", "type") if rope.get(name) is not None} or {"": "default"}
    for name, kind in kinds.items():
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            known = ", ".join(map(repr, ROPE_TYPES))
            raise UserError(f"{where}: {key}.{name} must be one of {known}, found {shown(kind)}.")
    if len(set(kinds.values())) > 1:
        raise UserError(f"{where}: {key}.type={kinds['type']!r} contradicts {key}.rope_type={kinds['rope_type']!r}.")
    kind = next(iter(kinds.values()))
    needed, optional = ROPE_TYPES[kind]
    for name, value in rope.items():
        if name == "partial_rotary_factor" and value in (None, 1.0):
            continue
        if name not in ("rope_type", "type", "rope_theta", "finetuned", *needed, *optional) and value is not None:
            raise UserError(
                f"{where}: {key}.{shown_key(name)} is not supported for rope type {kind!r}, found {shown(value)}."
            )
    inner = rope.get("rope_theta")
    if inner is not None and theta_given and inner != theta:
        raise UserError(f"{where}: {key}.rope_theta={shown(inner)} contradicts rope_theta={shown(theta)}.")
    numbers: dict[str, Any] = {name: rope.get(name) for name in needed}
    if numbers.get("original_max_position_embeddings", 1) is None:  # then transformers uses max_position_embeddings
        numbers["original_max_position_embeddings"] = positions
    for name, value in numbers.items():
        numbers[name] = positive(value, int if name.startswith("original") else float, f"{key}.{name}", where)
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise UserError(
            f"{where}: {key}.high_freq_factor must exceed low_freq_factor={numbers['low_freq_factor']}, "
            f"found {numbers['high_freq_factor']}."
        )
    if kind == "yarn":
        numbers |= _yarn(rope, numbers["factor"], key, where)
    renamed = {"original_max_position_embeddings": "rope_original_positions"}
    return {
        "rope_theta": positive(theta if inner is None else inner, float, "rope_theta", where),
        "rope_scaling": "" if kind == "default" else kind,
    } | {renamed.get(name, f"rope_{name}"): value for name, value in numbers.items()}


def _yarn(rope: dict[str, Any], factor: float, key: str, where: str) -> dict[str, Any]:
    """Returns yarn's optional numbers, with transformers' defaults (`_compute_yarn_parameters`)."""
    given = {
        name: positive(rope[name], float, f"{key}.{name}", where)
        for name in ROPE_TYPES["yarn"][1]
        if name != "truncate" and rope.get(name)  # 0 and null stand for the default
    }

    def mscale(scale: float, of: float = 1.0) -> float:
        return 0.1 * of * math.log(scale) + 1.0 if scale > 1 else 1.0

    if "mscale" in given and "mscale_all_dim" in given:
        inferred = mscale(factor, given["mscale"]) / mscale(factor, given["mscale_all_dim"])
    else:
        inferred = mscale(factor)
    return {
        "attention_factor": given.get("attention_factor", inferred),
        "beta_fast": given.get("beta_fast", 32.0),
        "beta_slow": given.get("beta_slow", 1.0),
        "untruncated": not one_of(rope.get("truncate"), (True, False), f"{key}.truncate", where),
    }
