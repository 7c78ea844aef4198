"""The mesh that a config asks for, and the meshes of fewer devices that other tests use."""

import math
import types
from typing import Any

import jax
import numpy as np
import pytest

from solar_jax.config import MeshConfig
from solar_jax.errors import UserError
from solar_jax.parallel.mesh import fsdp_groups, fsdp_stages, make_mesh, mesh_shape, platform


def mesh_of(*sizes: int) -> jax.sharding.Mesh:
    """A mesh of the first devices, as many as the sizes ask for: data, fsdp, tensor, context, slice, expert."""
    sizes += (1,) * (6 - len(sizes))
    return make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ((1, -1, 1), 1, (1, 1, 1, 1, 1, 1)),
        ((1, -1, 1), 64, (1, 1, 64, 1, 1, 1)),
        ((2, -1, 2), 8, (1, 2, 2, 1, 1, 2)),
        ((-1, 4, 2), 16, (1, 2, 4, 1, 1, 2)),
        ((1, 2, -1), 8, (1, 1, 2, 1, 1, 4)),
        ((2, 2, 2), 8, (1, 2, 2, 1, 1, 2)),
        ((8, -1, 1), 8, (1, 8, 1, 1, 1, 1)),  # nothing is left
        ((1, -1, 1, 4), 8, (1, 1, 2, 1, 4, 1)),
        ((1, 2, 1, -1), 8, (1, 1, 2, 1, 4, 1)),
        ((1, -1, 2, 2, 2), 16, (2, 1, 2, 1, 2, 2)),
    ],
)
def test_minus_one_takes_what_is_left_of_the_devices(sizes, devices, expected):
    # sizes: data, fsdp, tensor, context, slice; expected: in the order of AXES
    assert mesh_shape(MeshConfig(*sizes), devices) == expected


@pytest.mark.parametrize("asked", [0, 2])
def test_slices_are_as_many_as_the_devices_say(asked):
    assert mesh_shape(MeshConfig(slice=asked), 128, slices=2) == (2, 1, 64, 1, 1, 1)


@pytest.mark.parametrize("asked", [1, 4])
def test_other_slices_than_the_devices_form_are_refused(asked):
    # fsdp over the network between slices would gather every layer through it
    with pytest.raises(UserError, match=f"config.mesh.slice={asked} does not match the devices, which form 2 slices"):
        mesh_shape(MeshConfig(slice=asked), 128, slices=2)


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [
        ((1, 1, 1, 1), 8), ((2, 2, 4, 1), 8), ((3, -1, 1, 1), 8), ((16, -1, 1, 1), 8), ((1, 8, 1, 1), 1),
        ((2, 2, 2, 2), 8), ((1, -1, 1, 3), 8),
    ],
)  # fmt: skip
def test_sizes_that_do_not_multiply_to_the_devices_are_refused_with_both(sizes, devices):
    data, fsdp, tensor, context = sizes
    written = f"slice=1 x data={data} x fsdp={fsdp} x context={context} x tensor={tensor}"
    message = f"config.mesh {written} does not fit {devices} device"
    with pytest.raises(UserError, match=message):
        mesh_shape(MeshConfig(*sizes), devices)


@pytest.mark.parametrize("sizes", [(-2, 4, 1), (-1, -1, 1), (1, -1, -2), (1, -1, 1, -3), (1, -1, 1, 1, -1)])
def test_sizes_that_mean_nothing_are_refused(sizes):
    data, fsdp, tensor, context, slices = (*sizes, 1, 1)[:5]
    message = (
        f"config.mesh needs positive .* at most one -1, found slice={slices} x data={data} x fsdp={fsdp} "
        f"x context={context} x tensor={tensor}"
    )
    with pytest.raises(UserError, match=message):
        mesh_shape(MeshConfig(*sizes), 8)


def test_the_mesh_holds_every_device_once_on_auto_axes():
    mesh = make_mesh(MeshConfig(2, -1, 2))
    assert dict(mesh.shape) == {"slice": 1, "data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in jax.devices()]
    # Explicit axes, jax's default, would refuse the constraints of the training step.
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


class Chip:
    """A device as far as its place in a torus goes."""

    def __init__(self, *coords: int):
        self.coords = coords


def test_a_slice_is_a_block_of_consecutive_devices_where_they_know_of_none():
    # Devices come process after process, so that a slice is whole processes.
    mesh = make_mesh(MeshConfig(2, -1, 1, 2, 2))
    assert [[d.id for d in part.flat] for part in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert mesh.devices.shape == (2, 2, 1, 1, 2, 1)


class Tpu:
    """A device of one of several TPU slices, as far as laying out a mesh goes."""

    platform, device_kind, process_index = "tpu", "TPU v4", 0

    def __init__(self, slice_index: int, place: tuple[int, int, int]):
        self.slice_index, self.coords, self.core_on_chip = slice_index, place, 0


def test_devices_of_a_slice_stay_together_and_context_is_on_its_nearest_links():
    devices = [Tpu(i, tuple(reversed(place))) for place in np.ndindex(2, 2, 4) for i in (0, 1)]
    mesh = make_mesh(MeshConfig(1, -1, 1, 4), devices)
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 4, "expert": 1, "context": 4, "tensor": 1}
    for i, part in enumerate(mesh.devices):
        assert {d.slice_index for d in part.flat} == {i}
        for line in part[0, :, 0, :, 0]:  # four chips that differ in one coordinate or fill a plane
            assert len({d.coords for d in line}) == 4
            assert sum(len(set(c)) > 1 for c in zip(*(d.coords for d in line), strict=True)) <= 2


def torus(*shape: int) -> Any:
    """Stands in for a mesh whose fsdp axis runs over a torus, its last dimension fastest."""
    line = np.empty(int(np.prod(shape)), object)
    line[:] = [Chip(*place) for place in np.ndindex(*shape)]
    return types.SimpleNamespace(devices=line.reshape(1, 1, -1, 1, 1, 1), shape={"fsdp": len(line)})


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 4, 4), (16, 4)), ((2, 4, 8), (8, 8)), ((4, 4, 1), (16,)), ((16, 16, 1), (256,)), ((1, 1, 4), (4,))],
)
def test_parameters_are_gathered_in_two_stages_over_three_dimensions_and_in_one_otherwise(shape, expected):
    assert fsdp_stages(torus(*shape)) == expected


@pytest.mark.parametrize(("shape", "stages"), [((4, 4, 4), 2), ((2, 4, 8), 2), ((4, 4, 1), 1)])
def test_gathering_group_by_group_leaves_the_shards_in_order_on_every_device(shape, stages):
    mesh = torus(*shape)
    held = [[i] for i in range(mesh.shape["fsdp"])]  # the shards of each device
    assert len(fsdp_groups(mesh)) == stages
    for groups in fsdp_groups(mesh):
        assert sorted(i for group in groups for i in group) == list(range(len(held)))
        together = {i: [shard for j in group for shard in held[j]] for group in groups for i in group}
        held = [together[i] for i in range(len(held))]
    assert held == [list(range(len(held)))] * len(held)


def test_devices_without_a_place_are_one_stage():
    assert fsdp_stages(mesh_of(1, 4, 2)) == (4,)


def test_a_mesh_knows_what_its_devices_are():
    assert platform(mesh_of(1, 2, 1)) == "cpu"
    assert platform(mesh_of(1, 2, 1).abstract_mesh) == "cpu"
    assert platform(jax.sharding.AbstractMesh((2,), ("fsdp",))) == ""
