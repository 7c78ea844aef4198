"""Families of checkpoints, a row each: how the classes of a `model_type` interpret config.json and name tensors."""

import dataclasses
from typing import Any

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
    # End of a usual tensor's name -> what its files hold in its place, a tensor of each expert ({}), by rows.
    stacked: dict[str, str] = dataclasses.field(default_factory=dict)


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
# Keys of our own in an upcycled model's config.json; transformers' Mixtral computes their defaults, 1 and true, alone.
GRANULARITY, NORMALISED = "solar_jax_expert_granularity", "solar_jax_norm_topk_prob"
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
    "mixtral": Family(
        "MixtralForCausalLM",
        _COMMON | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
                   "rope_theta": 1000000.0, "num_local_experts": 8, "num_experts_per_tok": 2,
                   GRANULARITY: 1, NORMALISED: True},
        bias={False: ""},
        fixed={"use_sliding_window": (True,), "max_window_layers": (0,), "router_jitter_noise": (0.0,)} | _NO_BIAS,
        ignored=frozenset({"router_aux_loss_coef", "output_router_logits"}),  # training's own, see config.experts
        stacked={f"block_sparse_moe.experts.{w}.weight": f"block_sparse_moe.experts.{{}}.{w}.weight"
                 for w in ("w1", "w2", "w3")},
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


def stacked_tensors(hf: dict[str, Any]) -> dict[str, str]:
    """Returns the ends of the names of usual tensors -> those of the tensors of each expert that files hold instead."""
    family = FAMILIES.get(hf.get("model_type", ""))
    return family.stacked if family else {}


def _tensors(hf: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    family = FAMILIES.get(hf.get("model_type", ""))
    return family.tensors if family else ()
