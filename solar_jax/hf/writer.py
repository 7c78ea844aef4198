"""A model out: a Hugging Face folder written a tensor at a time, visible only when whole."""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from solar_jax.config import ModelConfig
from solar_jax.errors import UserError
from solar_jax.hf import safetensors
from solar_jax.hf.reader import INDEX
from solar_jax.hf.tensors import hf_shape, hf_tensors, pick, to_hf
from solar_jax.model.llama import Params

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def numpy_dtype(name: str) -> np.dtype:
    """float32, bfloat16 or float16."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


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


def check_target(out: pathlib.Path) -> None:
    """Raises a UserError unless `out` is free: not there, or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; give a new folder.")


@contextlib.contextmanager
def new_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary sibling of `out` to fill; it becomes `out` if the block ends well and vanishes if not."""
    check_target(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as e:
        raise UserError(f"{out}: cannot be written: {e.strerror}.") from e
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        if out.exists():
            out.rmdir()
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_checkpoint(
    folder: pathlib.Path,
    params: Params,
    cfg: ModelConfig,
    hf_config: dict[str, Any],
    companions: dict[str, bytes],
    dtype: str,
    max_shard_size: int,
) -> None:
    """Fills an empty folder with config, tokenizer files and weights.

    Args:
      folder: exists and is empty.
      params: the state, arrays of any float dtype.
      cfg: of the state.
      hf_config: the content of config.json.
      companions: other files by name.
      dtype: of the weights in the file.
      max_shard_size: bytes of weights a file holds, but for a single larger tensor.
    """
    out_dtype = numpy_dtype(dtype)
    where = {name: (path, layer) for name, path, layer in hf_tensors(cfg)}

    def get(name: str) -> np.ndarray:
        path, layer = where[name]
        return to_hf(np.asarray(pick(params, path, layer)), path, cfg).astype(out_dtype)

    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used, total = 0, 0
    for name, (path, _) in where.items():
        shape = hf_shape(path, cfg)
        size = math.prod(shape) * out_dtype.itemsize
        if shards[-1] and used + size > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append((name, shape))
        used, total = used + size, total + size
    weight_map = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        safetensors.write(folder / file, shard, out_dtype, get)
        weight_map |= {name: file for name, _ in shard}
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_companions(folder, hf_config, companions)


def write_companions(folder: pathlib.Path, hf_config: dict[str, Any], companions: dict[str, bytes]) -> None:
    """config.json and the tokenizer files: a checkpoint without its weights."""
    _write_json(folder / "config.json", hf_config)
    for name, content in companions.items():
        (folder / name).write_bytes(content)


def _write_json(file: pathlib.Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
