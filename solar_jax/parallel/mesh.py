"""The device mesh: slice x data x fsdp x context x tensor, over whatever devices there are."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from solar_jax.config import MeshConfig
from solar_jax.errors import UserError

# From the axis that moves the fewest bytes to the one that moves the most. `slice` alone crosses the network between
# TPU slices; the others stay on the links of one.
AXES = ("slice", "data", "fsdp", "context", "tensor")


def mesh_shape(cfg: MeshConfig, devices: int, slices: int = 1) -> tuple[int, ...]:
    """The sizes of `AXES`, a -1 filled with what is left of the devices.

    Sizes of 0, which nothing has chosen, are 1, and of fsdp what is left if no other axis takes it.

    Args:
      cfg: what is asked for.
      devices: how many there are.
      slices: that they form, as far as they know; the config may only part a single one.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or not to that of a slice.
    """
    if slices > 1 and cfg.slice not in (0, slices):
        raise UserError(f"config.mesh.slice={cfg.slice} does not fit the devices, which form {slices} slices.")
    sizes = {name: getattr(cfg, name) for name in AXES}
    rest = 1 if -1 in sizes.values() else -1
    shape = [size or {"slice": slices, "fsdp": rest}.get(name, 1) for name, size in sizes.items()]
    written = " x ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True))
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1 or cfg.slice < 0:
        raise UserError(f"config.mesh needs positive sizes and at most one -1, found {written}.")
    known = math.prod(size for size in shape if size != -1)
    filled = tuple(devices // known if size == -1 else size for size in shape)
    if math.prod(filled) != devices:
        raise UserError(f"config.mesh {written} does not fit {devices} device(s).")
    return filled


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of the devices, all there are if None, in Auto mode: shardings are given at the ends and as constraints.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    shape = mesh_shape(cfg, len(devices), slices)
    if slices > 1:
        inner, outer = (1, *shape[1:]), (slices, *(1 for _ in shape[1:]))
        laid_out = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    else:  # slices that only the config knows of are blocks of devices in their order, process after process
        laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(laid_out, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def axis_size(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, *axes: str) -> int:
    """The product of the sizes of some axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


def platform(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> str:
    """What its devices are, "tpu" or "cpu" for example; "" for an abstract mesh that does not say."""
    if isinstance(mesh, jax.sharding.Mesh):
        return mesh.devices.flat[0].platform
    return mesh.abstract_device.platform if mesh.abstract_device else ""


def fsdp_stages(mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    """Sizes whose product is fsdp x context, outermost first; a parameter is gathered over one after the other.

    Over all three dimensions of a TPU's torus at once, XLA makes an all-reduce of zeros of every all-gather: twice
    the bytes. So where the axes have all three, the innermost dimension is a stage of its own.
    """
    line = mesh.devices[0, 0, :, :, 0].reshape(-1)
    if not hasattr(line[0], "coords"):
        return (len(line),)
    coords = np.array([d.coords for d in line])
    if sum(len(set(c)) > 1 for c in coords.T) < 3:
        return (len(line),)
    moved = (coords != coords[0]).sum(axis=1) > 1
    inner = int(np.argmax(moved))  # the first device that is away from the first one in two dimensions, or none
    while len(line) % inner:
        inner -= 1
    return (len(line) // inner, inner)
