"""The planner's search: options, choice and refusals."""

import dataclasses

import pytest

from solar_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from solar_jax.errors import UserError
from solar_jax.hardware.slices import find_slice
from solar_jax.model.remat import REMAT
from solar_jax.planning import search
from solar_jax.planning.search import Devices, choose, fits, is_open, meshes, microbatches, need, of_slice, options
from tests.parallel.test_rules import SMALL
from tests.planning.test_memory import GIB, SOLAR

GIVEN, OPEN = MeshConfig(1, -1, 1, 1), MeshConfig()


def run(batch: int = 256, remat: str = "auto", accumulation: int = 0, mesh: MeshConfig = OPEN) -> Config:
    train = TrainConfig(10, batch, accumulation, remat=remat)
    return Config(name="run", fallback="smaller", data=DataConfig(sequence_length=4096), train=train, mesh=mesh)


def slice_of(name: str) -> Devices:
    return of_slice(find_slice(name))


def host(memory: float, count: int = 1) -> Devices:
    return Devices(count, "cpu", "cpu", memory)


def test_every_mesh_of_four_chips_is_tried_once():
    found = [dataclasses.astuple(m) for m in meshes(run(), slice_of("v5p-8"))]
    # data x fsdp x tensor x context = 4: one factor 4, or two factors 2 in one of six pairs.
    assert len(found) == len(set(found)) == 4 + 6
    assert all(data * fsdp * tensor * context == 4 for data, fsdp, tensor, context, *_ in found)


def test_what_the_config_gives_is_kept_and_a_minus_one_takes_the_rest():
    found = list(meshes(run(mesh=MeshConfig(data=0, fsdp=-1, tensor=2, context=1)), slice_of("v5p-16")))
    assert {(m.data, m.fsdp, m.tensor, m.context) for m in found} == {(1, 4, 2, 1), (2, 2, 2, 1), (4, 1, 2, 1)}
    assert list(meshes(run(mesh=GIVEN), slice_of("v5p-16"))) == [dataclasses.replace(GIVEN, expert=1)]


def test_several_slices_are_planned_with_the_devices_of_each():
    assert {m.data * m.fsdp * m.tensor * m.context for m in meshes(run(), slice_of("2xv5p-16"))} == {8}
    option, _ = choose(SOLAR, run(), slice_of("2xv5p-128"))
    assert option.mesh.shape["slice"] == 2
    assert option.mesh.size == 128


def test_microbatches_are_powers_of_two_that_divide_the_batch():
    assert microbatches(run(batch=12)) == [1, 2, 4]
    assert microbatches(run(batch=12, accumulation=3)) == [3]


def test_the_choice_fits_and_nothing_that_fits_is_faster():
    devices, asked = slice_of("v5p-64"), run(accumulation=1)
    option, wanted = choose(SOLAR, asked, devices)
    assert fits(wanted, devices)
    faster = [o for o in options(SOLAR, asked, devices) if o.time.total < (1 - 2 * search.NEAR) * option.time.total]
    assert faster  # there are some, and none of them fits
    assert not any(fits(need(SOLAR, o), devices) for o in faster)


def test_less_memory_means_more_is_computed_again():
    policies = [choose(SOLAR, run(mesh=GIVEN, accumulation=1), slice_of(name))[0] for name in ("v5p-128", "v5p-64")]
    saves = [list(REMAT).index(option.config.train.remat) for option in policies]
    assert saves[0] < saves[1]
    assert policies[0].time.total * 2 < policies[1].time.total  # half the chips, and more work


def test_rows_fewer_than_chips_are_split():
    # One row for each of 64 chips would leave 7 of 8 idle with 8 rows.
    option, _ = choose(SOLAR, run(batch=8), slice_of("v5p-128"))
    assert option.mesh.shape["context"] * option.mesh.shape["tensor"] >= 8


def test_what_fits_nowhere_is_refused_with_the_numbers():
    said = (
        r"10,731,524,096 parameters, needs at least [\d.]+ GiB .*4 TPU v5 lite device\(s\) has 15.8 GiB; smaller fits"
    )
    with pytest.raises(UserError, match=said):
        choose(SOLAR, run(), slice_of("v5e-4"))


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(UserError, match="does not fit 64 device"):
        options(SOLAR, run(mesh=MeshConfig(3, -1, 1, 1)), slice_of("v5p-128"))
    with pytest.raises(UserError, match=r"tensor=16 does not divide the model's num_key_value_heads=8"):
        options(SOLAR, run(mesh=MeshConfig(1, -1, 16, 1)), slice_of("v5p-128"))


def test_a_policy_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"config.train.remat must be one of none, .*auto, found 'some'"):
        options(SOLAR, run(remat="some"), slice_of("v5p-128"))


def test_devices_of_unknown_speed_shard_fully_and_compute_again_no_more_than_they_must():
    most = host(2**50, 8)
    option, wanted = choose(SMALL, run(8), most)
    assert dict(option.mesh.shape) == {"slice": 1, "data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    assert option.config.train.remat == next(iter(REMAT))
    assert option.config.train.accumulation == 1
    tight = host(0.8 * wanted.total, 8)
    assert list(REMAT).index(choose(SMALL, run(8), tight)[0].config.train.remat) > 0


@pytest.mark.parametrize(("hidden", "fsdp"), [(36, 4), (38, 2), (35, 1)])
def test_devices_of_unknown_speed_that_do_not_divide_the_model_are_given_to_data(hidden, fsdp):
    odd = dataclasses.replace(SMALL, hidden_size=hidden)
    option, _ = choose(odd, run(8), host(2**50, 8))
    assert (option.mesh.shape["fsdp"], option.mesh.shape["data"]) == (fsdp, 8 // fsdp)
    with pytest.raises(UserError, match=rf"config.mesh.fsdp=8 does not divide the model's hidden_size={hidden}\."):
        options(odd, run(8, mesh=MeshConfig(fsdp=8)), host(2**50, 8))


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (run(), True),
        (run(remat="full", accumulation=1), True),  # the mesh
        (run(remat="full", accumulation=1, mesh=GIVEN), False),
        (run(remat="full", mesh=GIVEN), True),
        (run(accumulation=1, mesh=GIVEN), True),
    ],
)
def test_a_config_says_what_it_leaves_open(config, left):
    assert is_open(config) == left


def test_a_little_memory_stays_free():
    option = options(SOLAR, run(remat="full", accumulation=1, mesh=GIVEN), slice_of("v5p-128"))[0]
    wanted = need(SOLAR, option)
    assert not fits(wanted, host(wanted.total))
    assert fits(wanted, host(wanted.total * 1.06))
    assert wanted.total > 10 * GIB


def test_collectives_that_a_machine_cannot_offload_are_refused_before_anything_is_allocated():
    asked = run()
    asked = dataclasses.replace(asked, train=dataclasses.replace(asked.train, offload_collectives=True))
    assert choose(SMALL, asked, slice_of("v6e-8"))[0].config.train.offload_collectives
    with pytest.raises(UserError, match="offload_collectives needs a TPU of v5p, v6e, found cpu"):
        choose(SMALL, asked, host(1e12))
