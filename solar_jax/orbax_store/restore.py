"""Arrays of a checkpoint, read from its files into device buffers, with checksums on the way.

Orbax reads each full array into new memory and copies it again, and checksums would then need another pass. Here a
chunk is read into its place and summed while it is in the cache; on a CPU that place is the array.
"""

import concurrent.futures
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from solar_jax.orbax_store import checksums
from solar_jax.orbax_store.arrays import open_array
from solar_jax.storage.paths import is_local

_READERS = {"disk": 4, "bucket": 32}  # arrays read concurrently; a bucket has high latency and high throughput
_BLOCK_BYTES = 1 << 22  # of rows read at a time, where a chunk is smaller
_ALIGNMENT = 64  # required by XLA for memory that it takes over

Box = tuple[slice, ...]


def restore(step: pathlib.Path, state: dict[str, Any]) -> tuple[dict[str, Any], checksums.Sums]:
    """Reads a checkpoint's arrays; each process reads what its devices hold.

    Args:
      step: its folder.
      state: by part ("params", "opt_state"): trees of abstract arrays with shardings, on any mesh; arrays are
        cast to their dtypes.

    Returns:
      The arrays in that layout, and this process's shares of the sums of what is stored.

    Raises:
      ValueError: one is damaged.
    """
    leaves, structure = jax.tree.flatten_with_path(state)
    names = [checksums.name_of(path) for path, _ in leaves]
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})  # nothing is read twice
    with concurrent.futures.ThreadPoolExecutor(_READERS["disk" if is_local(step) else "bucket"]) as pool:
        found = list(pool.map(lambda name, leaf: _restore(step, name, leaf[1], context), names, leaves))
    return jax.tree.unflatten(structure, [x for x, _ in found]), dict(zip(names, (s for _, s in found), strict=True))


def _restore(step: pathlib.Path, name: str, wanted: jax.ShapeDtypeStruct, context: ts.Context) -> tuple[jax.Array, int]:
    part, _, path = name.partition("/")
    array = open_array(step / part, path, context)
    shape, sharding = wanted.shape, wanted.sharding
    devices: dict[Box, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices.setdefault(_box(index, shape), []).append(device)
    counted = _counted_here(sharding, shape)
    held = {box: _empty(tuple(s.stop - s.start for s in box), wanted.dtype) for box in devices}
    if shape:
        groups = read_together(list(held), array.chunk_layout.read_chunk.shape)
        total = sum(s for group in groups for s in _fill(array, {box: held[box] for box in group}, counted))
    else:
        value = array.read().result()
        held[()][...] = value
        total = checksums.sum_of(value) if counted else 0

    def put(box: Box, device: jax.Device) -> jax.Array:
        # CPU devices share this memory; jax does not overwrite it, even where it is donated.
        place = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
        return jax.device_put(held[box], place, may_alias=True)

    arrays = [put(box, device) for box, same in devices.items() for device in same]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays), total % 2**32


def read_together(boxes: list[Box], chunk: tuple[int, ...]) -> list[list[Box]]:
    """Groups boxes of an array to read together: each by itself, or all, whichever reads fewer chunks.

    A checkpoint of the same mesh has a chunk per device; with another mesh several devices need parts of one.
    """

    def chunks(box: Box) -> int:
        return math.prod(-(-s.stop // size) - s.start // size for s, size in zip(box, chunk, strict=True))

    return [[box] for box in boxes] if sum(map(chunks, boxes)) <= chunks(_hull(boxes)) else [boxes]


def _hull(boxes: Iterable[Box]) -> Box:
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def _fill(array: Any, held: dict[Box, np.ndarray], counted: set[Box]) -> Iterator[int]:
    """Reads some boxes of an array; yields the sums of those that are `counted`."""
    hull, stored = _hull(held), array.dtype.numpy_dtype
    direct = len(held) == 1 and held[hull].dtype == stored
    for rows in _row_blocks(array, hull):
        region = (rows, *hull[1:])
        block = held[hull][_within(rows, hull[0])] if direct else np.empty([s.stop - s.start for s in region], stored)
        _read(array, region, block)
        for box, memory in held.items():
            here = slice(max(rows.start, box[0].start), min(rows.stop, box[0].stop))
            if here.start >= here.stop:
                continue
            part = block[tuple(map(_within, (here, *box[1:]), region))]
            place = memory[_within(here, box[0])]
            if not direct:
                _move(part, place)
            if box in counted:
                yield checksums.sum_of(place if place.dtype == stored else part, here.start)


def _within(part: slice, whole: slice) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _move(part: np.ndarray, place: np.ndarray) -> None:
    if part.dtype == place.dtype:  # as integers, which numpy copies faster than bfloat16
        part, place = (x.view(f"u{x.itemsize}") for x in (part, place))
    with np.errstate(over="ignore"):  # values out of float16's range become inf
        place[...] = part


def _row_blocks(array: Any, hull: Box) -> Iterator[slice]:
    """Yields rows of the leading axis to read at a time: full chunks, of about `_BLOCK_BYTES` at least."""
    row_bytes = max(1, math.prod(s.stop - s.start for s in hull[1:]) * array.dtype.numpy_dtype.itemsize)
    chunk = array.chunk_layout.read_chunk.shape[0]
    rows = max(1, _BLOCK_BYTES // (row_bytes * chunk)) * chunk
    start = hull[0].start
    while start < hull[0].stop:
        stop = min((start // rows + 1) * rows, hull[0].stop)
        yield slice(start, stop)
        start = stop


def _read(array: Any, box: Box, out: np.ndarray) -> None:
    ts.array(out, copy=False, write=True).write(array[box][ts.d[:].translate_to[0]]).result()


def _box(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Box:
    return tuple(slice(*s.indices(size)[:2]) for s, size in zip(index or (), shape, strict=True))


def _counted_here(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> set[Box]:
    """Returns the boxes that this process sums: each belongs to the first process that holds it."""
    first: dict[Box, int] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        box = _box(index, shape)
        first[box] = min(first.get(box, device.process_index), device.process_index)
    return {box for box, process in first.items() if process == jax.process_index()}


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)
