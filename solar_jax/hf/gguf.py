"""GGUF files of the `llama` architecture, seen as a Hugging Face checkpoint: config, tokenizer, tensors.

Quantised tensors are dequantised to float32. llama.cpp stores q_proj and k_proj with the two halves of each rotary
pair interleaved; they come out in Hugging Face's half-split order.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from solar_jax.errors import UserError
from solar_jax.hf.tensors import TENSORS

# GGUF key of the architecture -> config.json key
CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}

# `tokenizer.ggml.pre`: how the text is cut before byte-level BPE. Digits stand alone in SmolLM's.
PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


@dataclasses.dataclass(frozen=True)
class GGUF:
    """An opened file."""

    path: pathlib.Path
    fields: dict[str, Any]  # metadata
    tensors: dict[str, Any]  # HF name -> the reader's tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """In torch's order, [out, in]."""
        return tuple(int(n) for n in reversed(self.tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32 in HF's layout."""
        tensor = self.tensors[name]
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        x = x.reshape(self.shape(name))
        for suffix, heads in (("q_proj", "attention.head_count"), ("k_proj", "attention.head_count_kv")):
            if name.endswith(f"{suffix}.weight"):
                n = self.fields.get(f"llama.{heads}", self.fields["llama.attention.head_count"])
                x = x.reshape(n, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        return x


def open_gguf(path: pathlib.Path) -> GGUF:
    """Reads a file's metadata; tensors stay on disk.

    Raises:
      UserError: not a GGUF file, cut short, another architecture, or a tensor with no place in the model.
    """
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as e:
        raise UserError(f"{path}: is not a whole GGUF file: {e}.") from e
    if fields.get("general.architecture") != "llama":
        found = fields.get("general.architecture")
        raise UserError(f"{path}: general.architecture must be 'llama', found {found!r}.")
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise UserError(f"{path}: rope scaling must be 'none', found {fields['llama.rope.scaling.type']!r}.")
    for key in ("llama.attention.head_count", "llama.vocab_size"):
        if key not in fields:
            raise UserError(f"{path}: the metadata key {key} is missing.")
    hf_names = {row.gguf: row.hf for row in TENSORS.values()}
    tensors = {}
    for tensor in reader.tensors:
        generic = re.sub(r"^blk\.(\d+)\.", "blk.{}.", tensor.name)
        if generic not in hf_names:
            raise UserError(f"{path}: the tensor {tensor.name} has no place in the model.")
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        tensors[hf_names[generic].format(layer[1] if layer else "")] = tensor
    return GGUF(path, fields, tensors)


def hf_config(file: GGUF) -> dict[str, Any]:
    """The content of config.json that says the same as the file's metadata."""
    fields = file.fields
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    for key, hf_key in CONFIG_KEYS.items():
        if (value := fields.get(f"llama.{key}")) is not None:
            # GGUF holds float32, where 1e-5 reads 9.999999747e-06: take the shortest number that it stands for.
            config[hf_key] = float(str(np.float32(value))) if isinstance(value, float) else value
    config["vocab_size"] = fields["llama.vocab_size"]
    config["tie_word_embeddings"] = TENSORS["lm_head"].hf not in file.tensors
    for name in ("bos", "eos", "padding"):
        if (value := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{'pad' if name == 'padding' else name}_token_id"] = value
    return config | {"dtype": "float32"}


def tokenizer_files(file: GGUF) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json made from the file's vocabulary, merges and chat template.

    Raises:
      UserError: another tokenizer than a byte-level BPE of `PRE_TOKENIZERS`.
    """
    fields = file.fields
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        known = ", ".join(f"gpt2/{name}" for name in PRE_TOKENIZERS)
        raise UserError(f"{file.path}: the tokenizer must be one of {known}, found {kind}/{pre}.")
    prefix = "tokenizer.ggml."
    for key in (f"{prefix}tokens", f"{prefix}token_type", f"{prefix}merges", "llama.context_length"):
        if key not in fields:
            raise UserError(f"{file.path}: the metadata key {key} is missing.")
    tokens, kinds = fields[f"{prefix}tokens"], fields[f"{prefix}token_type"]
    if len(tokens) != len(kinds):
        raise UserError(f"{file.path}: {prefix}token_type must have {len(tokens)} entries, found {len(kinds)}.")
    try:
        merges = [tuple(merge.split(" ")) for merge in fields[f"{prefix}merges"]]
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    except Exception as e:  # the library raises Exception itself
        raise UserError(f"{file.path}: {prefix}merges do not fit {prefix}tokens: {e}.") from e
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL]
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in special])
    own = [t for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED]
    tokenizer.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in own])
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (value := fields.get(f"{prefix}{key}_token_id")) is not None:
            if not 0 <= value < len(tokens):
                raise UserError(f"{file.path}: {prefix}{key}_token_id must be under {len(tokens)}, found {value}.")
            config[f"{name}_token"] = tokens[value]
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }
