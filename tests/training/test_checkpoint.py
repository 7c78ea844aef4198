"""Checkpoints: every bit back, on any mesh, and no half-written one taken for whole."""

import functools
import math
import shutil

import jax
import numpy as np
import pytest

from solar_jax.config import CheckpointConfig, Config
from solar_jax.training.arrays import open_array
from solar_jax.training.checkpoint import FOLDER, CheckpointStore
from solar_jax.training.optimizer import make_optimizer
from solar_jax.training.step import State, abstract_state, state_shardings
from tests.parallel.test_mesh import mesh_of
from tests.parallel.test_rules import SMALL

OPTIMIZER = make_optimizer(Config())


@functools.cache
def abstract(shape: tuple[int, ...]) -> State:
    return abstract_state(SMALL, Config(), OPTIMIZER, state_shardings(SMALL, OPTIMIZER, mesh_of(*shape)))


def make_state(shape: tuple[int, ...], seed: int = 0) -> State:
    """Random bits in every float, so that rounding or a zero filled in would show, and counts of 7."""
    rng = np.random.default_rng(seed)

    def one(s: jax.ShapeDtypeStruct) -> jax.Array:
        if s.ndim == 0:
            return jax.device_put(np.full((), 7, s.dtype), s.sharding)
        return jax.device_put(rng.standard_normal(s.shape).astype(s.dtype), s.sharding)

    return jax.tree.map(one, abstract(shape))


def assert_same(found, expected, laid_out):
    for (path, a), b, s in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), jax.tree.leaves(laid_out), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
        assert a.dtype == b.dtype
        assert a.sharding.is_equivalent_to(s.sharding, a.ndim), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint of step 4, saved from data 2 x fsdp 2 x tensor 2; to be read only."""
    folder = tmp_path_factory.mktemp("saved")
    with CheckpointStore(folder) as store:
        store.save(4, **make_state((2, 2, 2)), host={"step": 4, "tokens": 1 << 40, "note": "ü"})
    return folder


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (1, 4, 2), (1, 1, 1), (1, 2, 1, 2, 2)])
def test_a_state_comes_back_bit_by_bit_on_any_mesh(saved, shape):
    with CheckpointStore(saved) as store:
        assert store.latest_step == 4
        params, opt_state, host = store.restore(4, abstract(shape)["params"], abstract(shape)["opt_state"])
    assert_same({"params": params, "opt_state": opt_state}, make_state((2, 2, 2)), abstract(shape))
    assert jax.tree.structure(opt_state) == jax.tree.structure(abstract(shape)["opt_state"])
    assert host == {"step": 4, "tokens": 1 << 40, "note": "ü"}


def test_parameters_come_back_without_the_optimiser(saved):
    wanted = abstract((1, 8, 1))["params"]
    with CheckpointStore(saved) as store:
        assert_same(store.restore_params(4, wanted), make_state((2, 2, 2))["params"], wanted)


def test_chunks_are_a_device_s_part_of_a_layer_or_of_an_array_outside_the_stack(saved):
    """An export reads layers one by one; chunks of several would be read again and again, chunks of a row are many."""
    for path, s in jax.tree.leaves_with_path(abstract((2, 2, 2))["params"]):
        name = "/".join(k.key for k in path)
        part = s.sharding.shard_shape(s.shape)
        whole = math.prod(part[1:] if name.startswith("layers/") else part)
        chunk = open_array(saved / FOLDER / "4" / "params", name).chunk_layout.read_chunk.shape
        assert chunk[0] == 1 or not name.startswith("layers/")
        replicas = 8 * math.prod(part) // math.prod(s.shape)  # each may write its share
        assert math.prod(chunk) * replicas >= whole, name


ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
EMBED = {"embed": jax.ShapeDtypeStruct((3,), np.float32, sharding=ONE)}


def small_state(step: int) -> dict:
    embed = jax.device_put(np.full(3, step, np.float32), ONE)
    return {"params": {"embed": embed}, "opt_state": {"mu": embed}, "host": {"step": step}}


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_are_kept_and_no_more(tmp_path, keep):
    with CheckpointStore(tmp_path, CheckpointConfig(keep=keep)) as store:
        for step in (3, 6, 9, 12):
            store.save(step, **small_state(step))
        assert store.latest_step == 12
    kept = sorted(int(p.name) for p in (tmp_path / FOLDER).iterdir())
    assert kept == [3, 6, 9, 12][-keep:]


def test_a_save_is_on_disk_when_it_returns(tmp_path):
    # A run that is stopped right after must find it.
    with CheckpointStore(tmp_path) as store:
        store.save(5, **small_state(5))
        shutil.copytree(tmp_path / FOLDER, tmp_path / "seen" / FOLDER)
    with CheckpointStore(tmp_path / "seen") as store:
        assert store.latest_step == 5
        found = store.restore_params(5, EMBED)
    np.testing.assert_array_equal(found["embed"], 5.0)


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with CheckpointStore(tmp_path) as store:
        assert store.latest_step is None


@pytest.mark.parametrize("suffix", [".orbax-checkpoint-tmp", ".orbax-checkpoint-tmp-1700000000"])
def test_an_interrupted_save_is_no_checkpoint_and_stops_no_later_one(tmp_path, suffix):
    with CheckpointStore(tmp_path, CheckpointConfig(keep=2)) as store:
        store.save(3, **small_state(3))
    # What a save leaves that was stopped before its folder got its name.
    leftover = tmp_path / FOLDER / f"6{suffix}"
    shutil.copytree(tmp_path / FOLDER / "3", leftover)
    shutil.rmtree(leftover / "params")
    with CheckpointStore(tmp_path, CheckpointConfig(keep=2)) as store:
        assert store.latest_step == 3
        store.save(6, **small_state(6))
    with CheckpointStore(tmp_path, CheckpointConfig(keep=2)) as store:
        assert store.latest_step == 6
        found = store.restore_params(6, EMBED)
        np.testing.assert_array_equal(found["embed"], 6.0)
    assert not leftover.exists()
