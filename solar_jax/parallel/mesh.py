"""The device mesh: data x fsdp x tensor, over whatever devices there are."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from solar_jax.config import MeshConfig
from solar_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def mesh_shape(cfg: MeshConfig, devices: int) -> tuple[int, int, int]:
    """The sizes of (data, fsdp, tensor), a -1 filled with what is left of the devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    shape = [cfg.data, cfg.fsdp, cfg.tensor]
    written = " x ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True))
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"config.mesh needs positive sizes and at most one -1, found {written}.")
    known = math.prod(size for size in shape if size != -1)
    filled = [devices // known if size == -1 else size for size in shape]
    if math.prod(filled) != devices:
        raise UserError(f"config.mesh {written} does not fit {devices} device(s).")
    return filled[0], filled[1], filled[2]


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of all devices, its axes in Auto mode: shardings are given at the ends and as constraints.

    `devices` are those that are here if not given; they may be ones to compile for that are not.
    """
    devices = jax.devices() if devices is None else devices
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(mesh_shape(cfg, len(devices)), AXES, axis_types=auto, devices=devices)


def platform(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> str:
    """What its devices are, "tpu" or "cpu" for example; "" for a mesh of no particular devices."""
    return mesh.devices.flat[0].platform if isinstance(mesh, jax.sharding.Mesh) else ""


def fsdp_stages(mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    """Sizes whose product is the fsdp axis, outermost first; a parameter is gathered over one after the other.

    Over all three dimensions of a TPU's torus at once, XLA makes an all-reduce of zeros of every all-gather: twice
    the bytes. So where the axis has all three, the innermost dimension is a stage of its own.
    """
    line = mesh.devices[0, :, 0]
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
