"""Writes a checkpoint from any source as one of ours, block by block: no stacked array is ever held in memory."""

import collections
import concurrent.futures
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint, equal_layers, row_blocks, row_unit, tensor_name
from solar_jax.checkpoints.tensor_table import TENSORS, from_hf, hf_shape, paths
from solar_jax.model.shapes import Params, param_shapes, sizes
from solar_jax.orbax_store.arrays import BlockWriter, array_paths, chunks, open_array, told_errors
from solar_jax.orbax_store.checksums import name_of
from solar_jax.orbax_store.layout import FOLDER
from solar_jax.orbax_store.streamed import write_streamed
from solar_jax.parallel import processes

Chunks = set[tuple[int, ...]]  # positions in an array's chunk grid
_WORKERS = 2  # blocks read and transposed concurrently
_AHEAD = 3  # blocks queued for the writer


def array_dtypes(c: Checkpoint) -> dict[str, np.dtype]:
    """Returns every array's dtype by path: that of its tensors, or float32 if they differ."""

    def one(path: str) -> np.dtype:
        layers = range(c.cfg.num_hidden_layers) if path.startswith("layers/") else (None,)
        found = {c.dtype_of[tensor_name(path, layer)] for layer in layers}
        return found.pop() if len(found) == 1 else np.dtype(np.float32)

    return {path: one(path) for path in paths(c.cfg)}


def total_bytes(c: Checkpoint) -> int:
    """Returns the bytes of the arrays that `write_params` writes."""
    dtypes, leaves = array_dtypes(c), jax.tree.leaves_with_path(param_shapes(c.cfg))
    return sum(s.size * dtypes[name_of(p)].itemsize for p, s in leaves)


def write_params(workdir: pathlib.Path, c: Checkpoint, progress: Callable[[int], None]) -> None:
    """Writes a checkpoint of step 0 under `workdir`; with several processes, each writes its share of the layers.

    Args:
      workdir: the folder above `checkpoints/`, local or in a bucket; empty or as an earlier run of this job left it.
      c: the checkpoint to write.
      progress: called with the bytes written since its last call.
    """
    dtypes = array_dtypes(c)
    shape = {name_of(p): s.shape for p, s in jax.tree.leaves_with_path(param_shapes(c.cfg))}
    tree: Params = {"layers": {}}
    for path, d in dtypes.items():
        group, _, leaf = path.rpartition("/")
        (tree[group] if group else tree)[leaf] = d

    folder = workdir / FOLDER / "0" / "params"

    def write_arrays(writer: BlockWriter) -> None:
        try:
            if processes.is_first():
                begun = {path: open_array(folder, path).shape for path in array_paths(folder)}
                for path in dtypes:  # replaces the one-element arrays that Orbax wrote
                    _array(writer, c, path, shape[path], dtypes[path], fresh=begun.get(path) != shape[path])
            processes.wait("the arrays are there to be filled")
            stored = chunks(folder)
            for path in dtypes:
                array = _array(writer, c, path, shape[path], dtypes[path], fresh=False)
                _write_array(writer, array, stored[path], c, path)
            writer.flush()
        finally:
            writer.abandon()  # after a failure, waits for the writes in flight

    with told_errors(workdir):
        write_streamed(workdir, tree, write_arrays, progress)
    processes.wait("the arrays are filled")


def _array(writer: BlockWriter, c: Checkpoint, path: str, shape: tuple[int, ...], dtype: np.dtype, fresh: bool) -> Any:
    """Creates an array on disk, in chunks of one block of a layer's file tensor."""
    row, unit = TENSORS[path], row_unit(path, c.cfg)
    block = next(row_blocks(hf_shape(path, c.cfg), unit))
    chunk = [sizes(c.cfg)[letter] for letter in row.axes]
    chunk[_rows_axis(path)] = (block.stop - block.start) // unit
    return writer.create(path, shape, dtype, (1, *chunk) if path.startswith("layers/") else tuple(chunk), fresh)


def _rows_axis(path: str) -> int:
    """Returns the axis of our layer's array along which the file's rows run."""
    return TENSORS[path].axes.index(TENSORS[path].hf_axes[0][0])


def _write_array(writer: BlockWriter, array: Any, stored: Chunks, c: Checkpoint, path: str) -> None:
    """Writes one array of the state; each distinct layer is read once and written everywhere it occurs.

    Layers whose chunks are all stored already are skipped.
    """
    unit, axis, dtype = row_unit(path, c.cfg), _rows_axis(path), array.dtype.numpy_dtype
    blocks = list(row_blocks(hf_shape(path, c.cfg), unit))
    index, count = processes.index_and_count()

    def prepare(item: tuple[list[int | None], slice]) -> tuple[list[int | None], slice, np.ndarray]:
        layers, rows = item
        with np.errstate(over="ignore"):  # values out of float16's range become inf
            x = c.read(tensor_name(path, layers[0]), rows).astype(dtype, copy=False)
        # As plain integers: numpy moves them several times faster than bfloat16, which it does not support natively.
        x = from_hf(x.view(f"u{dtype.itemsize}"), path, c.cfg)
        return layers, rows, np.ascontiguousarray(x).view(dtype)

    def positions(layer: int | None) -> Chunks:
        """Returns the positions of one layer's chunks in the array's grid."""
        at = [0] * len(TENSORS[path].axes)
        return {(*(() if layer is None else (layer,)), *at[:axis], i, *at[axis + 1 :]) for i in range(len(blocks))}

    for layers in equal_layers(c, path)[index::count]:
        if all(stored >= positions(layer) for layer in layers):
            writer.skip(len(layers) * math.prod(hf_shape(path, c.cfg)) * dtype.itemsize)
            continue
        for group, rows, block in _ahead(prepare, [(layers, rows) for rows in blocks]):
            at: list[Any] = [slice(None)] * len(TENSORS[path].axes)
            at[axis] = slice(rows.start // unit, rows.stop // unit)
            for layer in group:
                writer.write(array, tuple(at) if layer is None else (layer, *at), block)


def _ahead(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Maps in threads, a bounded number of results ahead."""
    with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
        waiting: collections.deque[Any] = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
