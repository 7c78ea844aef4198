"""Converts Hugging Face `config.json` per architecture to a ModelConfig, and back to config.json for a grown model.

Each key is read, restricted to the values that the model computes, or known not to affect the maths. Any other key with
a value is rejected: ignoring it would give a different model from the one that was trained.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from solar_jax.config import ModelConfig
from solar_jax.errors import UserError

_LARGEST = (1 << 63) - 1
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclasses.dataclass(frozen=True)
class Family:
    """How transformers' classes of one `model_type` interpret config.json."""

    architecture: str
    defaults: dict[str, Any]  # keys that are read -> default if absent
    bias: dict[bool, str]  # `attention_bias` -> projections with a bias; other values are rejected
    qk_norm: bool = False
    fixed: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)  # like `FIXED`, for this family
    ignored: frozenset[str] = frozenset()  # keys that change the maths of other families, not of this one


_COMMON = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "head_dim": None,  # hidden_size / num_attention_heads
    "attention_bias": False,
    "sliding_window": None,
    "use_sliding_window": True,
    "max_window_layers": 0,  # layers below it have no window, unless `layer_types` is set
    "layer_types": None,
}
_WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers")
_QWEN = _COMMON | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}

# `model_type` -> family. SOLAR 10.7B, SmolLM2, TinyLlama and Yi are llama; Mistral-Nemo is mistral; Qwen2.5 is qwen2.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        _COMMON | {"num_key_value_heads": None, "max_position_embeddings": 2048},  # None: number of heads
        bias={False: "", True: "qkvo"},
        ignored=frozenset(_WINDOW_KEYS),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _COMMON | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        bias={False: ""},
        fixed={"use_sliding_window": (True,), "max_window_layers": (0,)},
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN | {"attention_bias": True}, bias={True: "qkv"}),
    "qwen3": Family("Qwen3ForCausalLM", _QWEN | {"head_dim": 128}, bias={False: "", True: "qkvo"}, qk_norm=True),
}

# Keys that change the maths -> the only supported values; null or absent counts as the first.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}

# Keys with any value: provenance, and settings for training, generation or other programs.
HARMLESS = {
    # transformers' PretrainedConfig, old and new
    "_name_or_path", "name_or_path", "_commit_hash", "model_type", "architectures", "auto_map", "transformers_version",
    "dtype", "torch_dtype", "use_cache", "return_dict", "output_hidden_states", "output_attentions", "torchscript",
    "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "tokenizer_class", "prefix", "is_decoder", "tie_encoder_decoder",
    "tie_last_hidden_states", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
    "_flash_attn_2_enabled", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "cls_token_id", "mask_token_id", "decoder_start_token_id",
    # training; we never apply dropout
    "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range",
    "pretraining_tp", "gradient_checkpointing", "gradient_checkpointing_kwargs", "neftune_noise_alpha", "loss_type",
    "use_flash_attention", "use_flash_attention_2", "use_flash_attn", "use_sdpa", "use_memory_efficient_attention",
    "attention_probs_dropout_prob", "classifier_dropout", "layerdrop", "keys_to_ignore_at_inference",
    "deepspeed", "zero3", "fsdp", "fp16", "bf16", "low_cpu_mem_usage", "device_map", "trust_remote_code", "cache_dir",
    # generation, as configs carried it before generation_config.json
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "num_return_sequences", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "output_scores", "return_dict_in_generate", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "num_assistant_tokens", "num_assistant_tokens_schedule", "cache_implementation",
    # written by other programs, or into well-known checkpoints
    "unsloth_version", "unsloth_fixed", "unsloth_tied_weights", "transformers.js_config", "is_llama_config",
    "max_sequence_length", "model_max_length", "custom_pipelines", "license", "language",
}  # fmt: skip

# rope type -> its parameters; other types, and other keys with a value, are rejected
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

PER_LAYER = ("layer_types",)  # keys that list one value per layer


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
        raise UserError(f"{where}: model_type must be one of {', '.join(FAMILIES)}, found {_short(kind)}.")
    family = FAMILIES[kind]
    _check_keys(hf, family, where)
    read = set(family.defaults) - set(family.fixed) - family.ignored
    known = family.defaults | {key: value for key, value in hf.items() if key in read}
    size = {key: _positive(hf.get(key), int, key, where) for key in SIZES}
    heads = size["num_attention_heads"]
    kv_heads = known["num_key_value_heads"]
    kv_heads = heads if kv_heads is None else _positive(kv_heads, int, "num_key_value_heads", where)
    if heads % kv_heads:
        raise UserError(f"{where}: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}.")
    positions = _positive(known["max_position_embeddings"], int, "max_position_embeddings", where)
    return ModelConfig(
        **size,
        num_key_value_heads=kv_heads,
        head_dim=_head_dim(known["head_dim"], family, size["hidden_size"], heads, where),
        max_position_embeddings=positions,
        rms_norm_eps=_positive(known["rms_norm_eps"], float, "rms_norm_eps", where),
        tie_word_embeddings=_one_of(known["tie_word_embeddings"], (False, True), "tie_word_embeddings", where),
        sliding_window=_window(known, size["num_hidden_layers"], where),
        attention_bias=family.bias[_one_of(known["attention_bias"], tuple(family.bias), "attention_bias", where)],
        qk_norm=family.qk_norm,
        **_rope(known, hf.get("rope_theta") is not None, positions, where),
    )


def _check_keys(hf: dict[str, Any], family: Family, where: str) -> None:
    """Raises a UserError for a key that asks for something the model does not compute."""
    found = hf.get("architectures")
    if found and found != [family.architecture]:
        raise UserError(f"{where}: architectures must be [{family.architecture!r}], found {_short(found)}.")
    fixed = FIXED | family.fixed
    known = {*SIZES, *family.defaults, *family.ignored, *HARMLESS}
    for key, value in hf.items():
        if key in fixed:
            if value is not None and value not in fixed[key]:
                raise UserError(f"{where}: {key} must be {fixed[key][0]!r}, found {_short(value)}.")
        elif key not in known and value is not None and value is not False and value != {} and value != []:
            raise UserError(f"{where}: the key {_name(key)} is not supported, found {_short(value)}.")


def _name(key: str) -> str:
    """Returns a key as is, or quoted and shortened if it would break a message."""
    return key if key.isprintable() and len(key) <= 80 else _short(key)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_of(value: Any, allowed: tuple[Any, ...], key: str, where: str) -> Any:
    """Returns `value` if allowed; null counts as the first allowed value."""
    if value is None:
        return allowed[0]
    if value not in allowed or type(value) is not type(allowed[0]):
        raise UserError(f"{where}: {key} must be {' or '.join(map(repr, allowed))}, found {_short(value)}.")
    return value


def _positive(value: Any, kind: type, key: str, where: str) -> Any:
    """Returns `value` as a positive, finite int or float; ints must fit 64 bits, as other programs require."""
    if type(value) not in (int, kind) or not 0 < value <= (_LARGEST if kind is int else sys.float_info.max):
        name = "integer" if kind is int else "number"
        raise UserError(f"{where}: {key} must be a positive {name}, found {_short(value)}.")
    return kind(value)


def _head_dim(found: Any, family: Family, hidden_size: int, heads: int, where: str) -> int:
    """Returns H: as in config.json, or D / N where the family may omit it."""
    if found is None and family.defaults["head_dim"] is None:
        if hidden_size % heads:
            raise UserError(f"{where}: num_attention_heads={heads} must divide hidden_size={hidden_size}.")
        head_dim = hidden_size // heads
    else:
        head_dim = _positive(found, int, "head_dim", where)
    if head_dim % 2:
        raise UserError(f"{where}: head_dim must be even for rotary embeddings, found {head_dim}.")
    return head_dim


def _window(known: dict[str, Any], layers: int, where: str) -> int:
    """Returns the sliding window of all layers, 0 for none; a window on only some layers is rejected."""
    used = _one_of(known["use_sliding_window"], (False, True), "use_sliding_window", where)
    window = known["sliding_window"] if used else None
    window = 0 if window is None else _positive(window, int, "sliding_window", where)
    expected, types = "sliding_attention" if window else "full_attention", known["layer_types"]
    if types is None:
        first = known["max_window_layers"]
        if window and first != 0:
            raise UserError(
                f"{where}: max_window_layers must be 0, so that sliding_window={window} applies to every layer, "
                f"found {_short(first)}."
            )
    elif not isinstance(types, list) or len(types) != layers:
        found = f"{len(types)} entries" if isinstance(types, list) else _short(types)
        raise UserError(f"{where}: layer_types must list num_hidden_layers={layers} entries, found {found}.")
    elif other := [(i, t) for i, t in enumerate(types) if t != expected]:
        i, found = other[0]
        raise UserError(
            f"{where}: layer_types must be {expected!r} for every layer where the sliding_window in use is "
            f"{window or None}, found {_short(found)} for layer {i}."
        )
    return window


def _rope(known: dict[str, Any], theta_given: bool, positions: int, where: str) -> dict[str, Any]:
    """ModelConfig's rope keys; older files have `rope_theta` and `rope_scaling`, newer ones `rope_parameters`."""
    found = {}
    for key in ("rope_parameters", "rope_scaling"):
        if known[key]:
            found[key] = _rope_dict(known[key], known["rope_theta"], theta_given, positions, key, where)
    if len({tuple(sorted(rope.items())) for rope in found.values()}) > 1:
        raise UserError(
            f"{where}: rope_scaling and rope_parameters must agree, found {_short(known['rope_scaling'])} "
            f"and {_short(known['rope_parameters'])}."
        )
    for rope in found.values():
        return rope
    return {"rope_theta": _positive(known["rope_theta"], float, "rope_theta", where)}


def _rope_dict(rope: Any, theta: Any, theta_given: bool, positions: int, key: str, where: str) -> dict[str, Any]:
    """Returns ModelConfig's rope keys from one `rope_scaling` or `rope_parameters`."""
    if not isinstance(rope, dict):
        raise UserError(f"{where}: {key} must be a JSON object, found {_short(rope)}.")
    kinds = {name: rope[name] for name in ("rope_type", "type") if rope.get(name) is not None} or {"": "default"}
    for name, kind in kinds.items():
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            known = ", ".join(map(repr, ROPE_TYPES))
            raise UserError(f"{where}: {key}.{name} must be one of {known}, found {_short(kind)}.")
    if len(set(kinds.values())) > 1:
        raise UserError(f"{where}: {key}.type={kinds['type']!r} contradicts {key}.rope_type={kinds['rope_type']!r}.")
    kind = next(iter(kinds.values()))
    for name, value in rope.items():
        if name == "partial_rotary_factor" and value in FIXED[name]:
            continue
        if name not in ("rope_type", "type", "rope_theta", *ROPE_TYPES[kind]) and value is not None:
            raise UserError(
                f"{where}: {key}.{_name(name)} is not supported for rope type {kind!r}, found {_short(value)}."
            )
    inner = rope.get("rope_theta")
    if inner is not None and theta_given and inner != theta:
        raise UserError(f"{where}: {key}.rope_theta={_short(inner)} contradicts rope_theta={_short(theta)}.")
    numbers: dict[str, Any] = {name: rope.get(name) for name in ROPE_TYPES[kind]}
    if numbers.get("original_max_position_embeddings", 1) is None:  # then transformers uses max_position_embeddings
        numbers["original_max_position_embeddings"] = positions
    for name, value in numbers.items():
        numbers[name] = _positive(value, int if name.startswith("original") else float, f"{key}.{name}", where)
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise UserError(
            f"{where}: {key}.high_freq_factor must exceed low_freq_factor={numbers['low_freq_factor']}, "
            f"found {numbers['high_freq_factor']}."
        )
    renamed = {"original_max_position_embeddings": "rope_original_positions"}
    return {
        "rope_theta": _positive(theta if inner is None else inner, float, "rope_theta", where),
        "rope_scaling": "" if kind == "default" else kind,
    } | {renamed.get(name, f"rope_{name}"): value for name, value in numbers.items()}


def grown_hf_config(hf: dict[str, Any], source: Sequence[int]) -> dict[str, Any]:
    """HF config keys of a model whose layer i is the base's layer source[i]; every other key as in `hf`."""
    grown = hf | {"num_hidden_layers": len(source)}
    for key in PER_LAYER:
        if isinstance(values := hf.get(key), list):
            grown[key] = [values[i] for i in source]
    return grown


def with_dtype(hf: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """HF config keys of a model stored in `dtype`; None leaves what `hf` says of it."""
    if dtype is None:
        return hf
    keys = [key for key in ("dtype", "torch_dtype") if key in hf] or ["dtype"]
    return hf | dict.fromkeys(keys, dtype)


def differences(expected: ModelConfig, found: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Returns keys that `expected` sets and that differ in `found`, as (expected, found)."""
    if not expected.num_hidden_layers:
        return {}
    return {k: (v, getattr(found, k)) for k, v in vars(expected).items() if v and v != getattr(found, k)}
