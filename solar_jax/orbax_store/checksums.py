"""Checkpoint verification: sums of the bits on the devices, compared with the files and stored beside them.

A sum adds an array's bits as unsigned integers of the element width, each row of the leading axis times an odd number
of its own, modulo 2 ** 32. It does not depend on mesh or host count, so that each host sums what it holds. It detects
any single changed, lost or zeroed element and reordered rows; it does not protect against an adversary.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from solar_jax.errors import phrase
from solar_jax.orbax_store.arrays import array_paths, open_array
from solar_jax.orbax_store.layout import COMMITTED
from solar_jax.parallel import processes
from solar_jax.storage import paths
from solar_jax.storage.paths import is_local

SEAL = "verified.json"  # written once the checkpoint was read back
_NOT_FINITE = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}  # exponent bits, all set
_BLOCK_BYTES = 1 << 26

Sums = dict[str, int]  # "params/layers/q_proj" -> its sum, or a process's share of it
Views = dict[str, list[tuple[int, np.ndarray]]]  # same names -> (first row, this process's part)


def name_of(path: Any) -> str:
    """Returns the name of an array in a state's tree, e.g. "params/layers/q_proj"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def views(state: dict[str, Any]) -> Views:
    """Copies to the host the parts of a state's arrays that this process sums, each part once over all processes.

    The copies stay valid when the devices' buffers are donated.
    """
    return {
        name_of(path): [
            (shard.index[0].start or 0 if x.ndim else 0, np.asarray(shard.data))
            for shard in x.addressable_shards
            if shard.replica_id == 0
        ]
        for path, x in jax.tree.leaves_with_path(state)
    }


def _bits(x: np.ndarray) -> np.ndarray:
    """Views an array as unsigned integers [rows, rest]."""
    rows = x.shape[0] if x.ndim else 1
    return np.ascontiguousarray(x).reshape(rows, -1).view(f"u{x.dtype.itemsize}")


def sum_of(x: np.ndarray, first_row: int = 0) -> int:
    """Returns the sum of part of an array that starts at a row of its leading axis."""
    rows = _bits(x).sum(axis=1, dtype=np.uint32)
    weights = 2 * np.arange(first_row, first_row + len(rows), dtype=np.uint32) + 1
    return int((rows * weights).sum(dtype=np.uint32))


def _is_finite(x: np.ndarray) -> bool:
    mask = _NOT_FINITE.get(x.dtype.name)
    return mask is None or not any(((row & mask) == mask).any() for row in _bits(x))


def sums(parts: Views) -> Sums:
    """Returns this process's shares of the sums."""
    return {name: sum(sum_of(x, row) for row, x in pieces) % 2**32 for name, pieces in parts.items()}


def not_finite(parts: Views) -> list[str]:
    """Returns the names of the parameters with a NaN or an infinity in this process's part."""
    params = {name: pieces for name, pieces in parts.items() if name.startswith("params/")}
    return [name for name, pieces in params.items() if not all(_is_finite(x) for _, x in pieces)]


def stored_sums(step: pathlib.Path, names: Iterable[str]) -> Sums:
    """Returns the sums of a checkpoint's arrays as stored in its files; all of their bytes are read.

    Raises:
      ValueError, OSError: they cannot be read.
    """
    return {name: _stored_sum(step, name) for name in names}


def _stored_sum(step: pathlib.Path, name: str) -> int:
    folder, _, path = name.partition("/")
    array = open_array(step / folder, path)
    if not array.ndim:
        return sum_of(array.read().result())
    # A layer's chunks are read together; an array without layers is read in blocks of rows.
    row_bytes = max(1, math.prod(array.shape[1:]) * array.dtype.numpy_dtype.itemsize)
    chunk = array.chunk_layout.read_chunk.shape[0]
    rows = max(chunk, _BLOCK_BYTES // row_bytes // chunk * chunk)
    total = 0
    for row in range(0, array.shape[0], rows):
        total += sum_of(array[row : min(row + rows, array.shape[0])].read().result(), row)
    return total % 2**32


def stored_shapes(step: pathlib.Path, parts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Returns the shape by name of every array in some of a checkpoint's parts, from their metadata.

    Raises:
      ValueError, OSError: it cannot be read.
    """
    return {
        f"{part}/{path}": tuple(open_array(step / part, path).shape)
        for part in parts
        for path in array_paths(step / part)
    }


def _sizes(step: pathlib.Path) -> dict[str, int]:
    """Returns the bytes of every file of a checkpoint except the seal, by relative path."""
    if is_local(step):
        return {
            str((pathlib.Path(root) / name).relative_to(step)): (pathlib.Path(root) / name).stat().st_size
            for root, _, names in os.walk(step)
            for name in names
            if name != SEAL
        }
    found: dict[str, int] = {}
    folders = [step]
    while folders:  # folder by folder, since etils does not support ** in a bucket
        for f in folders.pop().iterdir():
            if f.is_dir():
                folders.append(f)
            elif f.name != SEAL:
                found[f.as_posix().removeprefix(f"{step.as_posix()}/")] = f.stat().length  # type: ignore[attr-defined]
    return found


def write_seal(step: pathlib.Path, total: Sums) -> None:
    """Writes the sums and file sizes of an intact checkpoint beside its arrays."""
    paths.write_file(step / SEAL, json.dumps({"sums": total, "files": _sizes(step)}, indent=0))


def read_seal(step: pathlib.Path) -> dict[str, Any] | None:
    """Returns {"sums", "files"}, or None if the checkpoint was never verified because its run ended right after it."""
    text = paths.read_text(step / SEAL)
    return None if text is None else json.loads(text)


def problem(step: pathlib.Path) -> str | None:
    """Checks a checkpoint's commit marker and its files' names and sizes; a phrase that says what is wrong, or None."""
    if not (step / COMMITTED).exists():
        return "it has no commit marker, so its save or removal was interrupted"
    try:
        seal = read_seal(step)
        return None if seal is None else _missing(seal["files"], _sizes(step))
    except (ValueError, OSError, KeyError) as e:
        return f"it cannot be read ({phrase(e)})"


def misshapen(stored: dict[str, tuple[int, ...]], state: dict[str, Any]) -> str | None:
    """The first array that is missing or has another shape, as a phrase, or None.

    Args:
      stored: as `stored_shapes` returns it.
      state: the expected content by part ("params", "opt_state"): trees of abstract arrays. Dtypes may differ.
    """
    for path, expected in jax.tree.leaves_with_path(state):
        name = name_of(path)
        if name not in stored:
            return f"{name} is missing"
        if stored[name] != tuple(expected.shape):
            return f"{name} has shape {list(stored[name])}, expected {list(expected.shape)}"
    return None


def _missing(expected: dict[str, int], found: dict[str, int]) -> str | None:
    for file, size in expected.items():
        if file not in found:
            return f"its file {file} is missing"
        if found[file] != size:
            return f"its file {file} has {found[file]:,} bytes, expected {size:,}"
    return None


def differing(expected: Sums, found: Sums) -> str | None:
    """Returns a phrase that names the first array whose sum differs from the saved one, or None."""
    wrong = [name for name, value in found.items() if expected.get(name) != value]
    return f"the bytes of {wrong[0]} are not those that were saved" if wrong else None


def together(share: Sums) -> Sums:
    """Adds up the sums over all processes, which must call with the same names."""
    added = processes.added(np.array(list(share.values()), np.uint32))
    return dict(zip(share, map(int, added), strict=True))
