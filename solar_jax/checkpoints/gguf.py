"""GGUF files of Llama and Qwen architectures, presented as a Hugging Face checkpoint: config, tokenizer, tensors.

Tensors of float32, bfloat16 and float16 keep their dtype; a file with quantised tensors is dequantised to float32. In
files of architecture `llama`, which includes Mistral and SOLAR, llama.cpp stores q_proj and k_proj with the two halves
of each rotary pair interleaved; they are returned in Hugging Face's half-split order.
"""

import dataclasses
import functools
import math
import pathlib
import re
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from solar_jax.checkpoints.hf_families import FAMILIES
from solar_jax.checkpoints.tensor_table import TENSORS
from solar_jax.errors import UserError
from solar_jax.formats import gguf_tokenizer
from solar_jax.formats.gguf_header import read_header, short
from solar_jax.formats.safetensors import Entry

# `general.architecture`, the same as config.json's `model_type` -> tensors with interleaved heads
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "llama": ("layers/q_proj", "layers/q_bias", "layers/k_proj", "layers/k_bias"),
    "qwen2": (),
    "qwen3": (),
}

# GGUF key of the architecture -> (config.json key, default if absent; ... if required)
CONFIG_KEYS: dict[str, tuple[str, Any]] = {
    "block_count": ("num_hidden_layers", ...),
    "embedding_length": ("hidden_size", ...),
    "feed_forward_length": ("intermediate_size", ...),
    "attention.head_count": ("num_attention_heads", ...),
    "attention.head_count_kv": ("num_key_value_heads", None),  # the number of heads
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", ...),
    "attention.key_length": ("head_dim", None),  # hidden_size / num_attention_heads
    "context_length": ("max_position_embeddings", ...),
    "rope.freq_base": ("rope_theta", 10000.0),
    "vocab_size": ("vocab_size", None),  # the number of embedding rows
}
# Keys without effect, or redundant with another key.
_OTHER_KEYS = {"rope.scaling.type", "rope.scaling.factor", "rope.dimension_count", "attention.value_length"}
_OTHER_KEYS |= {"rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout"}
_FIXED = {"attention.causal": True}  # keys that change the maths -> the only supported value

# Types that are plain dtypes; others are quantised.
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

ROPE_FREQS = "rope_freqs.weight"
# Values of Llama 3.1, 3.2 and 3.3; their files hold the resulting frequency factors, not these numbers.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclasses.dataclass(frozen=True)
class GGUF:
    """An open GGUF file."""

    path: pathlib.Path
    fields: dict[str, Any]  # metadata
    tensors: dict[str, Entry]  # by HF name; `code` is the quantisation type
    interleaved: dict[str, int]  # HF name -> number of heads, for tensors in llama.cpp's order
    rope_factors: np.ndarray | None  # divisor of each rotary frequency, [head_dim / 2]

    @property
    def architecture(self) -> str:
        return self.fields["general.architecture"]

    def field(self, key: str) -> Any:
        """Returns the metadata value of an architecture key, or None if absent."""
        return self.fields.get(f"{self.architecture}.{key}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape in torch order, [out, in]."""
        return self.tensors[name].shape

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Reads the tensor, or only some rows of its first axis, in HF layout; quantised ones as float32.

        Raises:
          UserError: the file has been truncated.
        """
        entry = self.tensors[name]
        start, stop, _ = rows.indices(entry.shape[0])
        if name not in self.interleaved:
            return _rows(name, entry, start, stop)
        width = entry.shape[0] // self.interleaved[name]
        first, last = start // width, -(-stop // width)  # range of heads that contain the rows
        x = _rows(name, entry, first * width, last * width)
        x = x.reshape(last - first, width // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        return x[start - first * width : stop - first * width]


def _rows(name: str, entry: Entry, first: int, last: int) -> np.ndarray:
    """Reads and dequantises rows of a tensor."""
    if len(entry.shape) == 1:  # blocks run along the only axis
        whole = _dequantised(name, entry, entry.start, entry.stop, entry.shape)
        return whole[first:last]
    width = (entry.stop - entry.start) // max(entry.shape[0], 1)
    start = entry.start + first * width
    return _dequantised(name, entry, start, start + (last - first) * width, (last - first, *entry.shape[1:]))


def _dequantised(name: str, entry: Entry, start: int, stop: int, shape: tuple[int, ...]) -> np.ndarray:
    try:
        with entry.file.open("rb") as f:
            f.seek(start)
            data = f.read(stop - start)
    except OSError as e:
        raise UserError(f"{entry.file}: {name} cannot be read: {e.strerror}.") from e
    if len(data) != stop - start:
        raise UserError(f"{entry.file}: ends before byte {stop} of {name}; was it modified meanwhile?")
    if entry.code in PLAIN:
        return np.frombuffer(data, PLAIN[entry.code]).reshape(shape)
    if 0 in shape:
        return np.zeros(shape, np.float32)
    packed = np.frombuffer(data, np.uint8).reshape(math.prod(shape[:-1]), -1)
    with np.errstate(all="ignore"):  # non-finite scales give non-finite weights
        x = gguf.quants.dequantize(packed, GGMLQuantizationType[entry.code])
    return x.astype(np.float32, copy=False).reshape(shape)


@functools.cache
def _can_dequantise(code: str) -> bool:
    """Returns whether the package `gguf` supports the type, which only a trial run shows."""
    kind = GGMLQuantizationType[code]
    try:
        gguf.quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def open_gguf(path: pathlib.Path) -> GGUF:
    """Opens a GGUF file and reads its metadata; tensors stay on disk.

    Raises:
      UserError: the file is not GGUF or is truncated; or its architecture, a quantisation type or a tensor is not
        supported.
    """
    fields, entries = read_header(path)
    kind = fields.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise UserError(f"{path}: general.architecture must be one of {known}, found {short(kind)}.")
    if fields.get("general.type", "model") != "model":
        raise UserError(f"{path}: general.type must be 'model', found {short(fields['general.type'])}.")
    if (parts := fields.get("split.count", 1)) not in (0, 1):
        raise UserError(f"{path}: is one of {parts} parts of a model; merge them with llama-gguf-split first.")
    for name, entry in entries.items():
        if not _can_dequantise(entry.code):
            raise UserError(f"{path}: {name} has the quantisation type {entry.code}, which is not supported.")
    factors = entries.pop(ROPE_FREQS, None)
    rows = {row.gguf: (name, row.hf) for name, row in TENSORS.items()}
    tensors, interleaved = {}, {}
    for name, entry in entries.items():
        generic = re.sub(r"^blk\.(\d+)\.", "blk.{}.", name)
        if generic not in rows:
            raise UserError(f"{path}: the tensor {name} does not belong to the model.")
        layer = re.match(r"blk\.(\d+)\.", name)
        row, hf_name = rows[generic]
        hf_name = hf_name.format(layer[1] if layer else "")
        tensors[hf_name] = entry
        if row in ARCHITECTURES[kind]:
            interleaved[hf_name] = _heads(path, fields, kind, row)
            if entry.shape[0] % (2 * interleaved[hf_name]):
                raise UserError(f"{path}: {name} of {entry.shape[0]} rows does not hold {interleaved[hf_name]} heads.")
    read = None if factors is None else _rows(ROPE_FREQS, factors, 0, factors.shape[0])
    return GGUF(path, fields, tensors, interleaved, read)


def _heads(path: pathlib.Path, fields: dict[str, Any], kind: str, row: str) -> int:
    """Returns the number of heads of the query or key tensor."""
    key = f"{kind}.attention.head_count"
    if row.startswith("layers/k_") and f"{key}_kv" in fields:
        key += "_kv"
    if type(fields.get(key)) is not int or fields[key] < 1:
        raise UserError(f"{path}: the metadata key {key} must be a positive integer, found {short(fields.get(key))}.")
    return fields[key]


def dtypes(file: GGUF) -> dict[str, np.dtype]:
    """Returns the dtype of each tensor by HF name.

    llama.cpp stores vectors as float32 beside matrices of 16 bits. They have the matrices' dtype if it represents each
    of their values, as in a file that was converted from it.
    """
    kinds = {entry.code for entry in file.tensors.values()}
    if not kinds <= PLAIN.keys():
        return dict.fromkeys(file.tensors, PLAIN["F32"])
    found = {name: PLAIN[entry.code] for name, entry in file.tensors.items()}
    vectors = [name for name, entry in file.tensors.items() if len(entry.shape) == 1]
    matrices = {found[name] for name in found.keys() - set(vectors)}
    if len(matrices) == 1 and all(_fits(file.read(name), *matrices) for name in vectors):
        return dict.fromkeys(found, matrices.pop())
    return found


def _fits(x: np.ndarray, dtype: np.dtype) -> bool:
    """Returns whether each value of `x` is one of `dtype`."""
    with np.errstate(over="ignore"):
        return np.array_equal(x.astype(dtype).astype(np.float32), x.astype(np.float32))


def hf_config(file: GGUF) -> dict[str, Any]:
    """Builds the config.json content equivalent to the file's metadata.

    Raises:
      UserError: a key is missing, or has a value that config.json cannot express.
    """
    kind, family = file.architecture, FAMILIES[file.architecture]
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": kind, "hidden_act": "silu"}
    for key, (hf_key, absent) in CONFIG_KEYS.items():
        value = file.field(key)
        if value is None and absent is ...:
            raise UserError(f"{file.path}: the metadata key {kind}.{key} is missing.")
        if value is not None and type(value) not in (int, float):
            raise UserError(f"{file.path}: {kind}.{key} must be a number, found {short(value)}.")
        config[hf_key] = absent if value is None else value
    _complete(file, config)
    _check_keys(file, config)
    if scaling := _rope_scaling(file, config):
        config["rope_scaling"] = scaling
    if len(family.bias) > 1:  # the family allows both; only the tensors tell which
        config["attention_bias"] = TENSORS["layers/q_bias"].hf.format(0) in file.tensors
    if "mlp_bias" not in family.fixed:
        config["mlp_bias"] = TENSORS["layers/gate_bias"].hf.format(0) in file.tensors
    if config["num_hidden_layers"] > len(file.tensors):  # before anything loops over it
        raise UserError(
            f"{file.path}: {kind}.block_count must fit the file's {len(file.tensors)} tensors, "
            f"found {config['num_hidden_layers']}."
        )
    config["tie_word_embeddings"] = not {TENSORS["lm_head"].hf, TENSORS["embed"].hf} <= file.tensors.keys()
    for name, hf_name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        if type(value := file.fields.get(f"tokenizer.ggml.{name}_token_id")) is int:
            config[f"{hf_name}_token_id"] = value
    return config | {"dtype": "float32"}


def _complete(file: GGUF, config: dict[str, Any]) -> None:
    """Fills in absent keys, whose defaults GGUF derives from other keys for every architecture."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = heads
    if config["head_dim"] is None:
        if type(heads) is not int or heads < 1 or hidden % heads:
            raise UserError(f"{file.path}: {heads} heads must divide the embedding length {hidden}.")
        config["head_dim"] = hidden // heads
    if config["vocab_size"] is None:
        embed, head = TENSORS["embed"].hf, TENSORS["lm_head"].hf
        if embed not in file.tensors and head not in file.tensors:
            raise UserError(f"{file.path}: the tensor {TENSORS['embed'].gguf} is missing.")
        config["vocab_size"] = file.shape(embed if embed in file.tensors else head)[0]


def _check_keys(file: GGUF, config: dict[str, Any]) -> None:
    """Raises a UserError for an architecture key that asks for something the model does not compute."""
    prefix = f"{file.architecture}."
    expected = _FIXED | dict.fromkeys(("rope.dimension_count", "attention.value_length"), config["head_dim"])
    for name, value in file.fields.items():
        key = name.removeprefix(prefix)
        if key == name:
            continue
        if key in expected:
            if value != expected[key]:
                raise UserError(f"{file.path}: {name} must be {expected[key]!r}, found {short(value)}.")
        elif key not in CONFIG_KEYS and key not in _OTHER_KEYS and not (_is_number(value) and value == 0):
            raise UserError(f"{file.path}: the key {name} is not supported, found {short(value)}.")


def _is_number(value: Any) -> bool:
    return type(value) in (bool, int, float)


def _rope_scaling(file: GGUF, config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns config.json's `rope_scaling`."""
    kind, factor = file.field("rope.scaling.type"), file.field("rope.scaling.factor")
    if kind not in (None, "none", "linear"):
        raise UserError(f"{file.path}: rope scaling must be 'none' or 'linear', found {short(kind)}.")
    if factor is not None and not _is_number(factor):
        raise UserError(f"{file.path}: the rope scaling factor must be a number, found {short(factor)}.")
    # llama.cpp treats a factor without a type as linear, and a factor of 0 as none.
    linear = 1.0 if kind == "none" else float(factor or 1)
    factors = file.rope_factors
    if factors is None:
        return None if linear == 1 else {"rope_type": "linear", "factor": linear}
    scaling = None
    if factors.shape == (config["head_dim"] // 2,) and linear == 1:
        scaling = {"rope_type": "llama3", "factor": float(factors.max())} | _LLAMA3
    if scaling is None or not np.allclose(factors, _llama3_factors(scaling, config), rtol=1e-5, atol=0):
        raise UserError(
            f"{file.path}: {ROPE_FREQS} scales the rotary frequencies differently from Llama 3, which config.json "
            "cannot express."
        )
    return scaling if scaling["factor"] != 1 else None


def _llama3_factors(scaling: dict[str, Any], config: dict[str, Any]) -> np.ndarray:
    """Returns Llama 3's divisor of each rotary frequency: `factor` for low ones, 1 for high ones, smooth in between."""
    low, high, length = (scaling[key] for key in _LLAMA3)
    with np.errstate(all="ignore"):  # a non-positive base is rejected later
        waves = (
            2 * np.pi * np.float64(config["rope_theta"]) ** (np.arange(0, config["head_dim"], 2) / config["head_dim"])
        )
        share = np.clip((length / waves - low) / (high - low), 0, 1)  # unscaled share of the frequency
        return 1 / ((1 - share) / scaling["factor"] + share)


def tokenizer_files(file: GGUF) -> dict[str, bytes]:
    """Builds tokenizer.json and tokenizer_config.json from the vocabulary, merges or scores, and chat template.

    Raises:
      UserError: the tokenizer type is not supported, or metadata contradict each other.
    """
    return gguf_tokenizer.files(file.path, file.fields, file.field("context_length"))
