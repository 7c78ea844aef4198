"""A model out: a Hugging Face folder streamed from a checkpoint, grown and converted on the way."""

import concurrent.futures
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from solar_jax.checkpoints.checkpoint import (
    Checkpoint,
    from_params,
    grown_rows,
    is_copy,
    numpy_dtype,
    row_blocks,
    row_unit,
    source_name,
)
from solar_jax.checkpoints.hf_config import grown_hf_config
from solar_jax.checkpoints.hf_folder import INDEX
from solar_jax.checkpoints.tensor_table import hf_shape, hf_tensors
from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.formats import safetensors
from solar_jax.formats.safetensors import Piece
from solar_jax.growth.apply import grown_config
from solar_jax.growth.operators import GrowthPlan, identity
from solar_jax.model.llama import Params
from solar_jax.storage.paths import is_local

WRITERS = 2  # shards written at a time: one reads while the other writes
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
Progress = Callable[[int], None]  # told the bytes written since the last call


def parse_size(text: str) -> int:
    """Bytes of a size as transformers writes it, e.g. "5GB".

    Raises:
      UserError: it is not written so, or zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UserError(f"max_shard_size must be a size like 5GB, found {text!r}.")
    return size


def pieces(c: Checkpoint, plan: GrowthPlan, dtype: str | None) -> list[Piece]:
    """Every tensor of the grown model in the order that HF writes them, each with where its bytes come from.

    Args:
      c: the base.
      plan: made for its layers.
      dtype: of all tensors; each its own if None.
    """
    return [_piece(c, plan, name, path, layer, dtype) for name, path, layer in hf_tensors(grown_config(c.cfg, plan))]


def _piece(c: Checkpoint, plan: GrowthPlan, name: str, path: str, layer: int | None, dtype: str | None) -> Piece:
    source = source_name(path, layer, plan)
    shape, stored = hf_shape(path, c.cfg), c.dtype_of[source]
    out = numpy_dtype(dtype) if dtype else stored
    entry = c.entry_of.get(source)
    if entry is not None and out == stored and is_copy(path, layer, plan) and is_local(entry.file):
        return Piece(name, shape, out, entry)

    def blocks() -> Iterator[np.ndarray]:
        for rows in row_blocks(shape, row_unit(path, c.cfg)):
            with np.errstate(over="ignore"):  # float16 has no room for what float32 has: it becomes inf
                yield grown_rows(c, plan, path, layer, rows).astype(out, copy=False)

    return Piece(name, shape, out, blocks)


def shards(tensors: list[Piece], max_shard_size: int) -> dict[str, list[Piece]]:
    """File name -> its tensors, in order; a file holds `max_shard_size` bytes at most, but for a single larger one."""
    files: list[list[Piece]] = [[]]
    used = 0
    for piece in tensors:
        if files[-1] and used + piece.nbytes > max_shard_size:
            files.append([])
            used = 0
        files[-1].append(piece)
        used += piece.nbytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i + 1:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files)}


def write_model(
    folder: pathlib.Path,
    c: Checkpoint,
    plan: GrowthPlan | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: int,
    progress: Progress = lambda n: None,
    process: tuple[int, int] = (0, 1),
    has: Callable[[str], bool] | None = None,
    put: Callable[[pathlib.Path, str], None] | None = None,
) -> None:
    """Fills a folder with config, tokenizer files and weights.

    A shard has its name only when it is whole and on disk; those that an earlier, killed run left are not written
    again. No tensor is held whole but those that are neither copies nor in rows.

    Args:
      folder: exists; empty, or as an earlier run of the same job left it.
      c: the base.
      plan: grows it on the way.
      dtype: of the weights in the files; as stored if None.
      max_shard_size: bytes of weights a file holds.
      progress: told the bytes written since its last call.
      process: (index, count) of the processes that fill the folder together; each writes its share of the shards.
      has: whether a file is there already; looks into the folder if None.
      put: gives a finished file its name and place; within the folder if None.
    """
    has = has or (lambda name: (folder / name).exists())
    put = put or (lambda file, name: os.rename(file, folder / name))
    plan = plan or identity(c.cfg.num_hidden_layers)
    files = shards(pieces(c, plan, dtype), max_shard_size)
    index, count = process

    def write(file: str) -> None:
        if has(file):
            progress(sum(piece.nbytes for piece in files[file]))
            return
        temporary = folder / f"{file}.tmp"
        safetensors.write(temporary, files[file], progress)
        put(temporary, file)

    pool = concurrent.futures.ThreadPoolExecutor(WRITERS)
    try:
        for done in [pool.submit(write, file) for file in list(files)[index::count]]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
    if index:
        return
    if len(files) > 1:
        weight_map = {piece.name: file for file, tensors in files.items() for piece in tensors}
        total = sum(piece.nbytes for tensors in files.values() for piece in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = grown_hf_config(c.hf_config, plan.source, dtype or c.common_dtype)
    write_companions(folder, config, c.companions)


def write_checkpoint(
    folder: pathlib.Path,
    params: Params,
    cfg: ModelConfig,
    hf_config: dict[str, Any],
    companions: dict[str, bytes],
    dtype: str,
    max_shard_size: int,
) -> None:
    """`write_model` of the stacked state in memory."""
    c = from_params(params, cfg, hf_config, companions)
    write_model(folder, c, dtype=dtype, max_shard_size=max_shard_size)


def write_companions(folder: pathlib.Path, hf_config: dict[str, Any], companions: dict[str, bytes]) -> None:
    """config.json and the tokenizer files: a checkpoint without its weights."""
    for name, content in companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    write_json(folder / "config.json", hf_config)


def write_json(file: pathlib.Path, value: dict[str, Any]) -> None:
    file.write_text(json_text(value))


def json_text(value: dict[str, Any]) -> str:
    """As a person reads it; half a surrogate pair, which JSON may escape but no file hold, stays escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    return text + "\n"
