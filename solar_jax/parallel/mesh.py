"""The device mesh: data x fsdp x tensor, over whatever devices there are."""

import math

import jax

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


def make_mesh(cfg: MeshConfig) -> jax.sharding.Mesh:
    """A mesh of all devices, its axes in Auto mode: shardings are given at the ends and as constraints."""
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(mesh_shape(cfg, jax.device_count()), AXES, axis_types=auto)
