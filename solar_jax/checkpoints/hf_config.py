"""Converts Hugging Face `config.json` per architecture to a ModelConfig, and back to config.json for a grown model.

Each key is read, restricted to the values that the model computes, or known not to affect the maths. Any other key with
a value is rejected: ignoring it would give a different model from the one that was trained.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from solar_jax.checkpoints.hf_keys import one_of, positive, shown, shown_key
from solar_jax.checkpoints.hf_rope import rope_keys
from solar_jax.config import ModelConfig
from solar_jax.errors import UserError

MOST_LAYERS = 1 << 20  # a config may claim a billion
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
    architectures: tuple[str, ...] = ()  # further names of the architecture in released checkpoints
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)  # its name of a key -> the usual one
    # config.json key -> (field of ModelConfig, power that the value is raised to)
    multipliers: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    tensors: tuple[tuple[str, str], ...] = ()  # (part of a tensor's name, what is usual in its place), in order
    # Tensors that the family's files hold as one, by rows -> the usual ones in that order.
    fused: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


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
    "mlp_bias": False,
}
_NO_BIAS = {"mlp_bias": (False,)}
_MULTIPLIERS = {
    "embedding_multiplier": ("embedding_multiplier", 1),
    "attention_multiplier": ("attention_multiplier", 1),
    "residual_multiplier": ("residual_multiplier", 1),
}
_GRANITE = (*_MULTIPLIERS, "logits_scaling")
_WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers")
_WINDOWS = frozenset(_WINDOW_KEYS)  # of a family without windows
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
        ignored=_WINDOWS,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _COMMON | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        bias={False: ""},
        fixed={"use_sliding_window": (True,), "max_window_layers": (0,)} | _NO_BIAS,
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        _COMMON | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        bias={False: ""},
        fixed={"use_sliding_window": (True,), "max_window_layers": (0,)} | _NO_BIAS,
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN | {"attention_bias": True}, bias={True: "qkv"}, fixed=_NO_BIAS),
    "qwen3": Family(
        "Qwen3ForCausalLM", _QWEN | {"head_dim": 128}, bias={False: "", True: "qkvo"}, qk_norm=True, fixed=_NO_BIAS
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        _COMMON | {"num_key_value_heads": 8, "max_position_embeddings": 524288, "attention_bias": True,
                   "attention_out_bias": False, "head_dim": 128},
        bias={True: "qkv", False: ""},
        ignored=_WINDOWS,
    ),
    "internlm3": Family(
        "LlamaForCausalLM",
        _COMMON | {"num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "head_dim": 128},
        bias={False: "", True: "qkvo"},
        ignored=_WINDOWS,
        architectures=("InternLM3ForCausalLM",),
        aliases={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    ),
    "exaone": Family(
        "LlamaForCausalLM",
        _COMMON | {"num_key_value_heads": 8, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                   "rope_theta": 500000.0},
        bias={False: "", True: "qkvo"},
        ignored=_WINDOWS,
        architectures=("ExaoneForCausalLM",),
        aliases={"num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps",
                 "activation_function": "hidden_act"},
        tensors=(
            ("transformer.wte.", "model.embed_tokens."), ("transformer.h.", "model.layers."),
            ("transformer.ln_f.", "model.norm."), (".attn.attention.out_proj.", ".self_attn.o_proj."),
            (".attn.attention.", ".self_attn."), (".ln_1.", ".input_layernorm."),
            (".ln_2.", ".post_attention_layernorm."), (".mlp.c_fc_0.", ".mlp.gate_proj."),
            (".mlp.c_fc_1.", ".mlp.up_proj."), (".mlp.c_proj.", ".mlp.down_proj."),
        ),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _COMMON | {"num_key_value_heads": None, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        bias={False: ""},
        fixed={"use_sliding_window": (True,), "max_window_layers": (0,)} | _NO_BIAS,
        ignored=frozenset({"original_max_position_embeddings"}),  # of longrope, which is refused
        fused={"self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight",
                                             "self_attn.v_proj.weight"),
               "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight")},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _COMMON | {"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True,
                   "rope_theta": 2000000.0, "no_rope_layers": None, "no_rope_layer_interval": 4},
        bias={False: "", True: "qkvo"},
        fixed={"use_sliding_window": (False,)},
        ignored=_WINDOWS - {"use_sliding_window"},
    ),
    "granite": Family(
        "GraniteForCausalLM",
        _COMMON | {"num_key_value_heads": None, "max_position_embeddings": 2048} | dict.fromkeys(_GRANITE, 1.0),
        bias={False: "", True: "qkvo"},
        ignored=_WINDOWS,
        multipliers=_MULTIPLIERS | {"logits_scaling": ("logits_multiplier", -1)},
    ),
    "hyperclovax": Family(
        "HyperCLOVAXForCausalLM",
        _COMMON | {"num_key_value_heads": None, "max_position_embeddings": 2048, "use_post_norm": True}
        | dict.fromkeys(_GRANITE, 1.0) | {"attention_multiplier": None},
        bias={False: "", True: "qkvo"},
        ignored=_WINDOWS,
        multipliers=_MULTIPLIERS | {"logits_scaling": ("logits_multiplier", 1)},
    ),
}  # fmt: skip

# Keys that change the maths -> the only supported values; null or absent counts as the first.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
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
    "attention_dropout", "residual_dropout", "embed_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "initializer_range", "pretraining_tp", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "neftune_noise_alpha", "loss_type",
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


def depth_keys(hf: dict[str, Any]) -> list[str]:
    """Returns the keys of config.json that hold the number of layers."""
    family = FAMILIES.get(str(hf.get("model_type")))
    names = [own for own, key in (family.aliases if family else {}).items() if key == "num_hidden_layers"]
    return [key for key in ("num_hidden_layers", *names) if key in hf] or ["num_hidden_layers"]


def stored_name(name: str, hf: dict[str, Any]) -> str:
    """Returns what the family of a config.json calls the tensor of a usual name, in its files."""
    for own, usual in _tensors(hf):
        if usual in name:
            name = name.replace(usual, own)
    return name


def usual_name(name: str, hf: dict[str, Any]) -> str:
    """Inverts `stored_name`; usual names stay."""
    for own, usual in _tensors(hf):
        name = name.replace(own, usual)
    return name


def fused_tensors(hf: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Returns the ends of the names of tensors that the family's files hold as one -> those of the usual tensors."""
    family = FAMILIES.get(hf.get("model_type", ""))
    return family.fused if family else {}


def _tensors(hf: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    family = FAMILIES.get(hf.get("model_type", ""))
    return family.tensors if family else ()


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


def differences(expected: ModelConfig, found: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Returns keys that `expected` sets and that differ in `found`, as (expected, found)."""
    if not expected.num_hidden_layers:
        return {}
    return {k: (v, getattr(found, k)) for k, v in vars(expected).items() if v and v != getattr(found, k)}
