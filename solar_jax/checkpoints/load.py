"""Loads a checkpoint's tensors into the stacked, sharded state."""

from typing import Any

import jax
import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint, equal_layers, row_unit, tensor_name
from solar_jax.checkpoints.tensor_table import TENSORS, from_hf
from solar_jax.model.shapes import Params, param_shapes
from solar_jax.orbax_store.checksums import name_of


def load_params(c: Checkpoint, shardings: Params | None = None, dtype: Any = np.float32) -> Params:
    """Loads a checkpoint's weights as the stacked state.

    A process reads only the rows that its devices need, and only once, however many devices and layers hold them.
    Besides its devices' shards it holds one tensor at a time.

    Args:
      c: an opened checkpoint, or a view.
      shardings: the sharding of each array of the state; the first device holds everything if None.
      dtype: the dtype of all arrays, or a tree of dtypes.

    Returns:
      A tree with the structure of `model.shapes.param_shapes(c.cfg)`.
    """
    if shardings is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, param_shapes(c.cfg))
    dtypes = dtype if isinstance(dtype, dict) else jax.tree.map(lambda _: dtype, param_shapes(c.cfg))

    def load(key_path: Any, shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, dtype: Any) -> jax.Array:
        parts = _parts(c, name_of(key_path), shape.shape, sharding, dtype)
        return jax.make_array_from_callback(shape.shape, sharding, lambda index: parts[str(index)])

    return jax.tree.map_with_path(load, param_shapes(c.cfg), shardings, dtypes)


def _parts(
    c: Checkpoint, path: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding, dtype: Any
) -> dict[str, np.ndarray]:
    """Returns the shards of one array that this process's devices hold, by index."""
    row, unit, stacked = TENSORS[path], row_unit(path, c.cfg), path.startswith("layers/")
    axis = row.axes.index(row.hf_axes[0][0])  # axis of one layer's array along which the file's rows run
    indices: Any = {str(i): i for i in sharding.addressable_devices_indices_map(shape).values()}
    spans = {key: [range(n)[i] for n, i in zip(shape, index, strict=True)] for key, index in indices.items()}
    parts = {key: np.empty([len(span) for span in spans[key]], dtype) for key in indices}
    for layers in equal_layers(c, path):
        wanted = [(key, layer) for key in indices for layer in layers if not stacked or layer in spans[key][0]]
        if not wanted:
            continue
        rows = [spans[key][axis + stacked] for key, _ in wanted]
        start, stop = min(r.start for r in rows), max(r.stop for r in rows)
        x = from_hf(c.read(tensor_name(path, layers[0]), slice(start * unit, stop * unit)), path, c.cfg)
        for key, layer in wanted:
            index = list(indices[key][stacked:])
            own = spans[key][axis + stacked]
            index[axis] = slice(own.start - start, own.stop - start)
            into = parts[key] if layer is None else parts[key][layer - spans[key][0].start]
            into[...] = x[tuple(index)]
    return parts
