"""Checkpoints: every bit back, on any mesh, and no half-written one taken for whole."""

import contextlib
import functools
import json
import logging
import math
import resource
import shutil
import time

import jax
import numpy as np
import pytest

from solar_jax.config import CheckpointConfig, Config, TrainConfig
from solar_jax.errors import UserError
from solar_jax.orbax_store import checksums
from solar_jax.orbax_store.arrays import open_array
from solar_jax.orbax_store.layout import COMMITTED, FOLDER
from solar_jax.orbax_store.store import CheckpointStore
from solar_jax.storage import retry
from solar_jax.training.partition import everything
from solar_jax.training.state import State, abstract_state, state_shardings, stored_form
from tests.conftest import optimizer_of, weights_of
from tests.parallel.test_mesh import mesh_of
from tests.parallel.test_rules import SMALL

OPTIMIZER = optimizer_of(Config())


@functools.cache
def abstract(shape: tuple[int, ...]) -> State:
    return abstract_state(SMALL, weights_of(Config()), OPTIMIZER, state_shardings(SMALL, OPTIMIZER, mesh_of(*shape)))


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


def warned(folder, cfg=None) -> tuple[CheckpointStore, list[str]]:
    said: list[str] = []
    return CheckpointStore(folder, cfg or CheckpointConfig(keep=2), warn=said.append), said


ABSTRACT = {"params": EMBED, "opt_state": {"mu": EMBED["embed"]}}


@pytest.fixture
def two(tmp_path):
    """A folder with checkpoints of steps 3 and 6."""
    with CheckpointStore(tmp_path, CheckpointConfig(keep=2)) as store:
        for step in (3, 6):
            store.save(step, **small_state(step))
    return tmp_path


def data_file(step):
    """The largest file of the parameters' bytes."""
    return max((f for f in (step / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


DAMAGE = {
    "no commit marker": lambda step: (step / "commit_success.txt").unlink(),
    "is missing": lambda step: data_file(step).unlink(),
    "bytes, expected": lambda step: data_file(step).write_bytes(data_file(step).read_bytes()[:-1]),
    "cannot be read": lambda step: [f.write_bytes(b"?" * f.stat().st_size) for f in step.rglob("manifest.ocdbt")],
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_checkpoint_is_left_out_by_name_and_the_one_before_it_is_taken(two, words):
    DAMAGE[words](two / FOLDER / "6")
    store, said = warned(two)
    with store:
        found = store.restore_newest(ABSTRACT)
        assert found["host"]["step"] == 3
        assert store.latest_step == 3
        np.testing.assert_array_equal(found["params"]["embed"], 3.0)
        assert len(said) == 1
        assert str(two / FOLDER / "6") in said[0]
        assert words in said[0]
        store.save(6, **small_state(6))  # in its place
    with CheckpointStore(two) as store:
        assert store.restore_newest(ABSTRACT)["host"]["step"] == 6


def test_where_no_checkpoint_is_good_the_run_does_not_begin_again_by_itself(two):
    for step in ("3", "6"):
        DAMAGE["is missing"](two / FOLDER / step)
    store, said = warned(two)
    with store, pytest.raises(UserError, match=r"none of the checkpoints \(6, 3\) can be used"):
        store.restore_newest(ABSTRACT)
    assert len(said) == 2


def test_one_changed_bit_is_found_when_it_is_read_though_every_file_is_there(two):
    """The bytes of arrays have no checksum in OCDBT; here it is the sum that is changed, which tells the same."""
    step = two / FOLDER / "6"
    seal = json.loads((step / checksums.SEAL).read_text())
    assert set(seal["sums"]) == {"params/embed", "opt_state/mu"}
    seal["sums"]["params/embed"] ^= 1
    (step / checksums.SEAL).write_text(json.dumps(seal))
    store, said = warned(two)
    with store:
        assert store.restore_newest(ABSTRACT)["host"]["step"] == 3
    assert "the bytes of params/embed are not those that were saved" in said[0]


def test_sums_do_not_depend_on_the_mesh_and_notice_what_they_should():
    whole, split = (checksums.sums(checksums.views(make_state(shape))) for shape in ((1, 1, 1), (1, 2, 1, 2, 2)))
    assert whole == split
    x = np.random.default_rng(0).standard_normal((4, 8, 6)).astype(np.float32)
    changed = x.copy()
    changed[2, 3, 1] = np.nextafter(changed[2, 3, 1], np.inf)
    zeroed = x.copy()
    zeroed[1] = 0
    for other in (changed, zeroed, x[[1, 0, 2, 3]]):
        assert checksums.sum_of(other) != checksums.sum_of(x)
    assert checksums.sum_of(x) == (checksums.sum_of(x[:3]) + checksums.sum_of(x[3:], 3)) % 2**32


def test_the_state_may_be_given_away_while_it_is_written(tmp_path):
    double = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    state = {"layers": {"a": jax.device_put(np.random.default_rng(0).standard_normal((64, 256, 128)), ONE)}}
    expected = jax.tree.map(np.array, state)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=ONE), state)
    with CheckpointStore(tmp_path) as store:
        store.begin(1, params=state, host={"step": 1})
        for _ in range(5):
            state = double(state)
        jax.block_until_ready(state)
        assert store.settle() is None
        found = store.restore_params(1, abstract)
    np.testing.assert_array_equal(found["layers"]["a"], expected["layers"]["a"])
    assert not np.array_equal(state["layers"]["a"], expected["layers"]["a"])


def test_a_parameter_that_is_no_number_is_not_kept(two):
    state = small_state(9)
    state["params"]["embed"] = state["params"]["embed"].at[1].set(np.nan)
    with CheckpointStore(two) as store:
        with pytest.raises(
            UserError, match=r"after step 9 hold a NaN .*embed.* last good checkpoint is that of step 6"
        ):
            store.save(9, **state)
        assert store.restore_newest(ABSTRACT)["host"]["step"] == 6
    assert not (two / FOLDER / "9").exists()


@contextlib.contextmanager
def no_room():
    """Files of this process stay small, as on a disk that is full: what is written beyond fails in the system."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    logging.disable()  # Orbax's tracebacks, which pytest writes to a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        logging.disable(logging.NOTSET)


def test_what_the_disk_does_not_take_is_tried_again_and_then_ends_the_run_with_the_last_good_checkpoint(
    two, monkeypatch
):
    def large_state(step):
        return small_state(step) | {"params": {"embed": jax.device_put(np.full(1 << 18, step, np.float32), ONE)}}

    store, said = warned(two)
    with store:
        monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)
        with (
            no_room(),
            pytest.raises(
                UserError,
                match=r"/9: could not be saved in 4 tries \(File too large\); the last good checkpoint is that of "
                "step 6, and the same command resumes from there",
            ),
        ):
            store.save(9, **large_state(9))
        assert [text.split(": ", 1)[1] for text in said] == ["could not be saved (File too large); trying again"] * 3
        assert sorted(p.parent.name for p in (two / FOLDER).glob(f"*/{COMMITTED}")) == ["3", "6"]
        with no_room():
            store.begin(9, **large_state(9))
            assert store.settle() == "File too large"
        store.save(9, **large_state(9))  # there is room again, and what failed is not told once more
        assert said[3:] == []
        with no_room():
            store.begin(12, **large_state(12))
            while not store.failed:
                time.sleep(0.01)
    assert "the last save failed: File too large" in said[3]
    assert sorted(p.name for p in (two / FOLDER).iterdir()) == ["6", "9"]


def test_what_was_not_written_as_it_was_is_noticed_before_older_ones_go(two, monkeypatch):
    monkeypatch.setattr(checksums, "stored_sums", lambda step, names: dict.fromkeys(names, 1))
    with warned(two, CheckpointConfig(keep=1))[0] as store:
        store.begin(9, **small_state(9))
        assert store.settle() == "read back, the bytes of opt_state/mu are not those that were saved"
    assert sorted(p.name for p in (two / FOLDER).iterdir()) == ["3", "6"]


@pytest.mark.parametrize(("before", "after"), [("mixed", "bf16"), ("bf16", "mixed"), ("bf16", "bf16_moments")])
def test_a_state_goes_on_in_another_precision(tmp_path, before, after):
    def of(precision):
        config = Config(train=TrainConfig(precision=precision))
        optimizer = optimizer_of(config)
        mesh = mesh_of(1, 2, 1)
        return abstract_state(SMALL, weights_of(config), optimizer, state_shardings(SMALL, optimizer, mesh))

    def older(stored):
        config = Config(train=TrainConfig(precision=after))
        form = SMALL, weights_of(config), optimizer_of(config), mesh_of(1, 2, 1), everything(SMALL)
        return stored_form(of(after)["opt_state"], *form, stored)

    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda s: jax.device_put(np.asarray(7 if s.ndim == 0 else rng.standard_normal(s.shape), s.dtype), s.sharding),
        of(before),
    )
    with CheckpointStore(tmp_path) as store:
        store.save(7, **state, host={"step": 7})
        found = store.restore_newest(of(after), older=older)
    assert jax.tree.structure({k: found[k] for k in ("params", "opt_state")}) == jax.tree.structure(of(after))
    for x, wanted in zip(jax.tree.leaves(found["opt_state"]), jax.tree.leaves(of(after)["opt_state"]), strict=True):
        assert (x.dtype, x.shape) == (wanted.dtype, wanted.shape)
        if not x.ndim:
            assert int(x) == 7
    for x, saved in zip(jax.tree.leaves(found["params"]), jax.tree.leaves(state["params"]), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(saved.astype(x.dtype)))
