"""Checkpoints in: opened without reading a weight, and their tensors put into the stacked state."""

import dataclasses
import glob
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tokenizers

from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.hf import families, gguf, safetensors
from solar_jax.hf.tensors import DERIVED, TENSORS, from_hf, hf_shape, hf_tensors
from solar_jax.model.llama import Params, shapes

INDEX = "model.safetensors.index.json"
# What travels from a checkpoint to everything made from it.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: everything but the weights, and a way to each tensor."""

    where: str  # for messages
    hf_config: dict[str, Any]  # the content of config.json
    cfg: ModelConfig
    companions: dict[str, bytes]  # tokenizer and generation files by name
    dtype: str  # that holds every tensor exactly
    shape_of: dict[str, tuple[int, ...]]  # HF tensor name -> shape
    read: Callable[[str], np.ndarray]  # HF tensor name -> array in HF's layout


def open_gguf(path: pathlib.Path) -> Checkpoint:
    file = gguf.open_gguf(path)
    hf_config = gguf.hf_config(file)
    return Checkpoint(
        where=str(path),
        hf_config=hf_config,
        cfg=families.model_config(hf_config, str(path)),
        companions=gguf.tokenizer_files(file) | {"generation_config.json": _generation_config(hf_config)},
        dtype="float32",
        shape_of={name: file.shape(name) for name in file.tensors},
        read=file.read,
    )


def _generation_config(hf_config: dict[str, Any]) -> bytes:
    ids = {k: v for k, v in hf_config.items() if k.endswith("_token_id")}
    return json.dumps(ids, indent=2).encode()


def open_folder(folder: pathlib.Path) -> Checkpoint:
    hf_config = read_json(folder / "config.json")
    entries = _entries(folder)
    codes = {entry.code for entry in entries.values()}
    for name, entry in entries.items():
        if entry.code not in safetensors.DTYPES:
            known = ", ".join(safetensors.DTYPES)
            raise UserError(f"{entry.file}: {name} must be one of {known}, found {entry.code}.")
    # Several dtypes, as bfloat16 weights with float32 norms, all fit into float32 exactly.
    code = codes.pop() if len(codes) == 1 else "F32"
    return Checkpoint(
        where=str(folder),
        hf_config=hf_config,
        cfg=families.model_config(hf_config, str(folder / "config.json")),
        companions={name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).is_file()},
        dtype=safetensors.DTYPES[code].name,
        shape_of={name: entry.shape for name, entry in entries.items()},
        read=lambda name: safetensors.read(name, entries[name]),
    )


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: the file is missing or holds something else.
    """
    try:
        value = json.loads(file.read_text())
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: is not JSON: {e}.") from e
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object, found {type(value).__name__}.")
    return value


def _entries(folder: pathlib.Path) -> dict[str, safetensors.Entry]:
    """Every tensor of a folder's safetensors files, one file or as its index says."""
    if not (folder / INDEX).exists():
        files = sorted(glob.glob(glob.escape(str(folder)) + "/*.safetensors"))
        if len(files) != 1:
            raise UserError(
                f"{folder}: expected one .safetensors file, or several with {INDEX}, found {len(files)} without it."
            )
        entries = safetensors.read_header(pathlib.Path(files[0]))
        if not entries:
            raise UserError(f"{files[0]}: holds no tensors.")
        return entries
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: weight_map must map tensors to files, found {type(weight_map).__name__}.")
    headers, entries = {}, {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or file in ("", ".."):
            raise UserError(f"{folder / INDEX}: {name} must lie in a file of this folder, found {file!r}.")
        if file not in headers:
            headers[file] = safetensors.read_header(folder / file)
        if name not in headers[file]:
            raise UserError(f"{folder / file}: the tensor {name}, which {INDEX} places there, is missing.")
        entries[name] = headers[file][name]
    unlisted = {name for header in headers.values() for name in header} - set(weight_map)
    if unlisted:
        raise UserError(f"{folder / INDEX}: does not list {_some(unlisted)}, which its files hold.")
    return entries


def _some(names: set[str]) -> str:
    """The first names of a set, and how many more there are."""
    first = sorted(names)[:4]
    return ", ".join(first) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_tensors(c: Checkpoint) -> None:
    """Every tensor of the config is there with its shape, and nothing else is."""
    expected = {name: hf_shape(path, c.cfg) for name, path, _ in hf_tensors(c.cfg)}
    missing = set(expected) - set(c.shape_of)
    if missing:
        raise UserError(f"{c.where}: tensors of its config are missing: {_some(missing)}.")
    unused = {name for name in set(c.shape_of) - set(expected) if not name.endswith(DERIVED)}
    head, embed = TENSORS["lm_head"].hf, TENSORS["embed"].hf
    if c.cfg.tie_word_embeddings and head in unused and c.shape_of[head] == c.shape_of[embed]:
        if not np.array_equal(c.read(head), c.read(embed)):
            raise UserError(f"{c.where}: tie_word_embeddings is true, but {head} differs from {embed}.")
        unused.remove(head)
    if unused:
        raise UserError(f"{c.where}: tensors have no place in the model: {_some(unused)}.")
    for name, shape in expected.items():
        if c.shape_of[name] != shape:
            raise UserError(f"{c.where}: {name} must have shape {shape} by its config, found {c.shape_of[name]}.")


def load_params(c: Checkpoint, shardings: Params | None = None, dtype: Any = np.float32) -> Params:
    """The checkpoint's weights as the stacked state, each device's part read on its own.

    Args:
      c: an opened checkpoint.
      shardings: of the state's arrays; the first device holds everything if None.
      dtype: of the state's arrays.

    Returns:
      A tree shaped as `model.llama.shapes(c.cfg)`.
    """
    if shardings is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, shapes(c.cfg))

    def load(key_path: Any, shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        path = "/".join(k.key for k in key_path)
        row = TENSORS[path]
        read = {}  # index of a device's part -> the part; replicas read once

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if path.startswith("layers/"):
                layers = range(c.cfg.num_hidden_layers)[index[0]]
                rows = (from_hf(c.read(row.hf.format(i)), path, c.cfg)[index[1:]] for i in layers)
                out = np.empty((len(layers), *_extent(shape.shape[1:], index[1:])), dtype)
                for i, x in enumerate(rows):
                    out[i] = x
                return out
            return np.ascontiguousarray(from_hf(c.read(row.hf), path, c.cfg)[index], dtype)

        def cached(index: Any) -> np.ndarray:
            key = str(index)
            if key not in read:
                read[key] = part(index)
            return read[key]

        return jax.make_array_from_callback(shape.shape, sharding, cached)

    return jax.tree.map_with_path(load, shapes(c.cfg), shardings)


def _extent(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(len(range(n)[i]) for n, i in zip(shape, index, strict=True))


def load_tokenizer(c: Checkpoint) -> tokenizers.Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
      UserError: it has none as tokenizer.json, or its ids do not fit the embedding.
    """
    if "tokenizer.json" not in c.companions:
        raise UserError(f"{c.where}: tokenizer.json is missing.")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(c.companions["tokenizer.json"])
    except ValueError as e:
        raise UserError(f"{c.where}: tokenizer.json cannot be read: {e}.") from e
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest < 0:
        raise UserError(f"{c.where}: tokenizer.json has no tokens.")
    if largest >= c.cfg.vocab_size:
        raise UserError(
            f"{c.where}: the tokenizer has ids up to {largest}, but config.json's vocab_size is {c.cfg.vocab_size}."
        )
    return tokenizer


def eos_id(c: Checkpoint) -> int:
    """The token that ends a document (HF `eos_token_id`, the first where it lists several).

    Raises:
      UserError: config.json does not name one within the vocabulary.
    """
    found = c.hf_config.get("eos_token_id")
    first = found[0] if isinstance(found, list) and found else found
    if type(first) is not int or not 0 <= first < c.cfg.vocab_size:
        raise UserError(f"{c.where}: eos_token_id must be a token under {c.cfg.vocab_size}, found {found!r}.")
    return first
