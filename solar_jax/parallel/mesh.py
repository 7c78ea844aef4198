"""Device mesh: slice x data x fsdp x expert x context x tensor, over all available devices."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from solar_jax.config import MeshConfig
from solar_jax.errors import UserError

# Ordered from the axis that moves the fewest bytes to the one that moves the most. Only `slice` crosses DCN between TPU
# slices; the others stay on the ICI of one.
AXES = ("slice", "data", "fsdp", "expert", "context", "tensor")


def mesh_shape(cfg: MeshConfig, devices: int, slices: int = 1) -> tuple[int, ...]:
    """Resolves the sizes of `AXES`; a -1 takes all remaining devices.

    A size of 0 means not set: it becomes 1, or for fsdp all remaining devices unless another axis takes them.

    Args:
      cfg: the requested sizes.
      devices: number of devices.
      slices: number of slices that the devices report; the config may only subdivide a single one.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `slice` does not match the devices' slices.
    """
    if slices > 1 and cfg.slice not in (0, slices):
        raise UserError(f"config.mesh.slice={cfg.slice} does not match the devices, which form {slices} slices.")
    sizes = {name: getattr(cfg, name) for name in AXES}
    rest = 1 if -1 in sizes.values() else -1
    shape = [size or {"slice": slices, "fsdp": rest}.get(name, 1) for name, size in sizes.items()]
    named = [(name, size) for name, size in zip(AXES, shape, strict=True) if (name, size) != ("expert", 1)]
    written = " x ".join(f"{name}={size}" for name, size in named)
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1 or cfg.slice < 0:
        raise UserError(f"config.mesh needs positive sizes and at most one -1, found {written}.")
    known = math.prod(size for size in shape if size != -1)
    filled = tuple(devices // known if size == -1 else size for size in shape)
    if math.prod(filled) != devices:
        raise UserError(f"config.mesh {written} does not fit {devices} device(s).")
    return filled


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Builds a mesh of the devices (all if None) in Auto mode: shardings are set on inputs, outputs and constraints.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    shape = mesh_shape(cfg, len(devices), slices)
    if slices > 1:
        inner, outer = (1, *shape[1:]), (slices, *(1 for _ in shape[1:]))
        laid_out = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    else:  # slices set only in the config are blocks of consecutive devices, process by process
        laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(laid_out, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def axis_size(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, *axes: str) -> int:
    """Returns the product of the sizes of the given axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


def platform(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> str:
    """Returns the devices' platform, such as "tpu" or "cpu"; "" for an abstract mesh without one."""
    if isinstance(mesh, jax.sharding.Mesh):
        return mesh.devices.flat[0].platform
    return mesh.abstract_device.platform if mesh.abstract_device else ""


def fsdp_stages(mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    """Returns all-gather stages of a parameter, outermost first; their sizes multiply to fsdp x expert x context.

    Over all three dimensions of a TPU torus at once, XLA lowers every all-gather to an all-reduce of zero-padded
    shards: twice the bytes. So where the axes span all three, the innermost dimension is a stage of its own.
    """
    return _stages(mesh.devices[0, 0, :, :, :, 0].reshape(-1))


def fsdp_groups(mesh: jax.sharding.Mesh) -> list[list[list[int]]]:
    """Returns the stages of an all-gather over the axis fsdp alone, innermost first, each as groups of its indices.

    Gathering within each group, stage after stage, leaves the shards in their order on every device.
    """
    found, size, together = [], mesh.shape["fsdp"], 1
    for stage in reversed(_stages(mesh.devices[0, 0, :, 0, 0, 0])):
        span = together * stage
        found.append([list(range(i, i + span, together)) for j in range(0, size, span) for i in range(j, j + together)])
        together = span
    return found


def _stages(line: np.ndarray) -> tuple[int, ...]:
    """Returns the stages of an all-gather over a line of devices, outermost first."""
    if not hasattr(line[0], "coords"):
        return (len(line),)
    coords = np.array([d.coords for d in line])
    if sum(len(set(c)) > 1 for c in coords.T) < 3:
        return (len(line),)
    moved = (coords != coords[0]).sum(axis=1) > 1
    inner = int(np.argmax(moved))  # first device that differs from device 0 in two dimensions, if any
    while len(line) % inner:
        inner -= 1
    return (len(line) // inner, inner)
