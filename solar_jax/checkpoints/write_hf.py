"""Streams a checkpoint into a Hugging Face folder, growing and converting it on the way."""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint, row_blocks, row_unit
from solar_jax.checkpoints.hf_config import with_dtype
from solar_jax.checkpoints.hf_families import fused_tensors, stacked_tensors, stored_name
from solar_jax.checkpoints.hf_folder import INDEX
from solar_jax.checkpoints.tensor_table import hf_shape, hf_tensors
from solar_jax.errors import UserError
from solar_jax.formats.safetensors import Entry, Piece, read_tensor, write_safetensors
from solar_jax.storage.paths import is_local

WRITERS = 2  # shards written concurrently: one reads while the other writes
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
Progress = Callable[[int], None]  # called with the bytes written since the last call


def parse_size(text: str) -> int:
    """Parses a size in transformers' notation, e.g. "5GB", into bytes.

    Raises:
      UserError: the size is malformed or zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UserError(f"max_shard_size must be a size like 5GB, found {text!r}.")
    return size


def pieces(c: Checkpoint) -> list[Piece]:
    """Returns every tensor in HF's order, each with the source of its bytes."""
    whole_of = {part: (whole, parts) for whole, parts in fused_tensors(c.hf_config).items() for part in parts}
    made: dict[str, Piece] = {}
    waiting: dict[str, list[Piece]] = {}
    apart = stacked_tensors(c.hf_config)
    for name, path, _ in hf_tensors(c.cfg):
        piece, part = _piece(c, name, path), name.split(".", 3)[-1]
        if part in apart:
            own = name.removesuffix(part) + apart[part]
            made |= {own.format(e): _expert(c, name, path, e, own.format(e)) for e in range(c.cfg.num_local_experts)}
            continue
        if part not in whole_of:
            made[name] = piece
            continue
        whole, parts = whole_of[part]
        waiting.setdefault(fused := name.removesuffix(part) + whole, []).append(piece)
        if len(waiting[fused]) == len(parts):
            made[fused] = _fused(fused, waiting.pop(fused))
    return list(made.values())


def _fused(name: str, parts: list[Piece]) -> Piece:
    """Returns one tensor made of the rows of several: copied in the kernel where they lie one after another."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    entries = [part.content for part in parts if isinstance(part.content, Entry)]
    if len(entries) == len(parts) and all(
        a.file == b.file and a.stop == b.start for a, b in itertools.pairwise(entries)
    ):
        whole = dataclasses.replace(entries[0], shape=shape, stop=entries[-1].stop)
        return Piece(name, shape, parts[0].dtype, whole)

    def blocks() -> Iterator[np.ndarray]:
        for part in parts:
            yield from [read_tensor(name, part.content)] if isinstance(part.content, Entry) else part.content()

    return Piece(name, shape, parts[0].dtype, blocks)


def _expert(c: Checkpoint, name: str, path: str, expert: int, stored: str) -> Piece:
    """Returns one expert's rows of a layer's tensor, as a tensor of its own."""
    height, width = hf_shape(path, c.cfg)
    first = height // c.cfg.num_local_experts * expert
    shape = (height // c.cfg.num_local_experts, width)

    def blocks() -> Iterator[np.ndarray]:
        yield c.read(name, slice(first, first + shape[0]))  # in one, as Orbax stores it

    return Piece(stored, shape, c.dtype_of[name], blocks)


def _piece(c: Checkpoint, name: str, path: str) -> Piece:
    shape, entry, stored = hf_shape(path, c.cfg), c.entry_of.get(name), stored_name(name, c.hf_config)
    if entry is not None and is_local(entry.file):
        return Piece(stored, shape, c.dtype_of[name], entry)
    blocks = functools.partial(map, functools.partial(c.read, name))
    return Piece(stored, shape, c.dtype_of[name], lambda: blocks(row_blocks(shape, row_unit(path, c.cfg))))


def shards(tensors: list[Piece], max_shard_size: int) -> dict[str, list[Piece]]:
    """Maps file names to tensors, in order; a file holds at most `max_shard_size` bytes, or one larger tensor."""
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
    *,
    max_shard_size: int,
    progress: Progress = lambda n: None,
    process: tuple[int, int] = (0, 1),
    has: Callable[[str], bool] | None = None,
    put: Callable[[pathlib.Path, str], None] | None = None,
) -> None:
    """Writes config, tokenizer files and weights into a folder.

    A shard gets its final name only once it is complete and on disk; shards that an earlier, killed run left are not
    rewritten. Tensors are copied in the kernel or streamed in blocks of rows.

    Args:
      folder: an existing folder; empty, or as an earlier run of the same job left it.
      c: the checkpoint to write.
      max_shard_size: at most this many bytes of weights per file.
      progress: called with the bytes written since its last call.
      process: (index, count) of the processes that write the folder together; each writes its share of the shards.
      has: returns whether a file already exists; checks the folder if None.
      put: moves a finished file to its final name and place; within the folder if None.
    """
    has = has or (lambda name: (folder / name).exists())
    put = put or (lambda file, name: os.rename(file, folder / name))
    files = shards(pieces(c), max_shard_size)
    index, count = process

    def write(file: str) -> None:
        if has(file):
            progress(sum(piece.nbytes for piece in files[file]))
            return
        temporary = folder / f"{file}.tmp"
        write_safetensors(temporary, files[file], progress)
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
        write_config(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_companions(folder, with_dtype(c.hf_config, c.common_dtype), c.companions)


def write_companions(folder: pathlib.Path, hf_config: dict[str, Any], companions: dict[str, bytes]) -> None:
    """Writes config.json and the tokenizer files: a checkpoint without its weights."""
    for name, content in companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    write_config(folder / "config.json", hf_config)


def write_config(file: pathlib.Path, value: dict[str, Any]) -> None:
    file.write_text(json_text(value))


def json_text(value: dict[str, Any]) -> str:
    """Returns indented JSON; lone surrogates, which JSON can escape but UTF-8 cannot encode, stay escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    return text + "\n"
