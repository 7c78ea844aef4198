"""The mesh that a config asks for, and the meshes of fewer devices that other tests use."""

import types
from typing import Any

import jax
import numpy as np
import pytest

from solar_jax.config import MeshConfig
from solar_jax.errors import UserError
from solar_jax.parallel.mesh import AXES, fsdp_stages, make_mesh, mesh_shape, platform


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    """A mesh of the first data x fsdp x tensor devices."""
    devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return jax.sharding.Mesh(devices, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ((1, -1, 1), 1, (1, 1, 1)),
        ((1, -1, 1), 64, (1, 64, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((-1, 4, 2), 16, (2, 4, 2)),
        ((1, 2, -1), 8, (1, 2, 4)),
        ((2, 2, 2), 8, (2, 2, 2)),
        ((8, -1, 1), 8, (8, 1, 1)),  # nothing is left
    ],
)
def test_minus_one_takes_what_is_left_of_the_devices(sizes, devices, expected):
    assert mesh_shape(MeshConfig(*sizes), devices) == expected


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [((1, 1, 1), 8), ((2, 2, 4), 8), ((3, -1, 1), 8), ((16, -1, 1), 8), ((1, 8, 1), 1)],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused_with_both(sizes, devices):
    data, fsdp, tensor = sizes
    message = f"config.mesh data={data} x fsdp={fsdp} x tensor={tensor} does not fit {devices} device"
    with pytest.raises(UserError, match=message):
        mesh_shape(MeshConfig(*sizes), devices)


@pytest.mark.parametrize("sizes", [(0, -1, 1), (-2, 4, 1), (-1, -1, 1), (1, -1, 0)])
def test_sizes_that_mean_nothing_are_refused(sizes):
    data, fsdp, tensor = sizes
    message = f"config.mesh needs positive .* at most one -1, found data={data} x fsdp={fsdp} x tensor={tensor}"
    with pytest.raises(UserError, match=message):
        mesh_shape(MeshConfig(*sizes), 8)


def test_the_mesh_holds_every_device_once_on_auto_axes():
    mesh = make_mesh(MeshConfig(2, -1, 2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in jax.devices()]
    # Explicit axes, jax's default, would refuse the constraints of the training step.
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


class Chip:
    """A device as far as its place in a torus goes."""

    def __init__(self, *coords: int):
        self.coords = coords


def torus(*shape: int) -> Any:
    """Stands in for a mesh whose fsdp axis runs over a torus, its last dimension fastest."""
    line = np.empty(int(np.prod(shape)), object)
    line[:] = [Chip(*place) for place in np.ndindex(*shape)]
    return types.SimpleNamespace(devices=line.reshape(1, -1, 1))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 4, 4), (16, 4)), ((2, 4, 8), (8, 8)), ((4, 4, 1), (16,)), ((16, 16, 1), (256,)), ((1, 1, 4), (4,))],
)
def test_parameters_are_gathered_in_two_stages_over_three_dimensions_and_in_one_otherwise(shape, expected):
    assert fsdp_stages(torus(*shape)) == expected


def test_devices_without_a_place_are_one_stage():
    assert fsdp_stages(mesh_of(1, 4, 2)) == (4,)


def test_a_mesh_knows_what_its_devices_are():
    assert platform(mesh_of(1, 2, 1)) == "cpu"
    assert platform(mesh_of(1, 2, 1).abstract_mesh) == ""
