"""Reading arrays back: the bits, their sums, nothing twice, and memory that nobody else holds."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from solar_jax.config import CheckpointConfig
from solar_jax.orbax_store import checksums, restore
from solar_jax.orbax_store.arrays import layout_is_known
from solar_jax.orbax_store.layout import FOLDER
from solar_jax.orbax_store.store import CheckpointStore

DEVICES = np.array(jax.devices()[:8]).reshape(2, 4)
MESH = jax.sharding.Mesh(DEVICES, ("a", "b"))
ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
LAYOUTS = [P(), P("a"), P("b", "a"), P(None, ("a", "b")), P(("a", "b"))]


def values() -> dict[str, np.ndarray]:
    """A stack of layers and an array outside of it, with every bit at random but for those that make a NaN."""
    rng = np.random.default_rng(0)
    return {
        "layers": {"w": rng.standard_normal((8, 16, 24)).astype(np.float32)},
        "embed": rng.standard_normal((40, 16)).astype(ml_dtypes.bfloat16),
        "count": np.int32(7),
    }


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A checkpoint's folder, saved from one device, each of whose chunks every other mesh has to cut."""
    folder = tmp_path_factory.mktemp("saved")
    with CheckpointStore(folder) as store:
        store.save(1, params=jax.device_put(values(), ONE))
    return folder / FOLDER / "1"


def abstract(spec: P, dtype: str | None = None, memory_kind: str | None = None) -> dict:
    def one(x):
        sharding = NamedSharding(MESH, spec if np.ndim(x) else P(), memory_kind=memory_kind)
        return jax.ShapeDtypeStruct(np.shape(x), dtype if dtype and np.ndim(x) else x.dtype, sharding=sharding)

    return {"params": jax.tree.map(one, values())}


@pytest.mark.parametrize("spec", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [None, "float16", "float64"])
def test_every_layout_and_dtype_gets_its_elements_and_the_sums_are_those_of_the_files(step, spec, dtype):
    wanted = abstract(spec, dtype)
    with jax.enable_x64(True):
        found, sums = restore.restore(step, wanted)
        for x, expected, leaf in zip(*map(jax.tree.leaves, (found["params"], values(), wanted)), strict=True):
            assert x.sharding == leaf.sharding
            np.testing.assert_array_equal(np.asarray(x), np.asarray(expected).astype(leaf.dtype))
    assert sums == checksums.read_seal(step)["sums"]


@pytest.mark.parametrize("spec", LAYOUTS, ids=str)
def test_no_byte_is_read_twice_however_many_devices_share_a_chunk(step, spec, monkeypatch):
    read, sizes = restore._read, []
    monkeypatch.setattr(restore, "_read", lambda a, box, out: (sizes.append(out.nbytes), read(a, box, out)))
    restore.restore(step, abstract(spec))
    assert sum(sizes) == sum(x.nbytes for x in jax.tree.leaves(values()) if x.ndim)


def boxes(*ranges: tuple[int, int]) -> list[restore.Box]:
    return [(slice(0, 4), slice(*r), slice(0, 8)) for r in ranges]


def test_devices_far_from_one_another_read_their_own_chunks_and_none_in_between():
    mine = boxes((0, 2), (2, 4), (32, 34))
    assert restore.read_together(mine, (1, 2, 8)) == [[box] for box in mine]
    assert restore.read_together(mine, (1, 64, 8)) == [mine]  # as each would need the same chunk
    assert restore.read_together(boxes((0, 3), (3, 6)), (1, 2, 8)) == [boxes((0, 3), (3, 6))]  # the chunk of 2 and 3


def test_rows_are_read_by_whole_chunks(step, monkeypatch):
    read, boxes = restore._read, []
    monkeypatch.setattr(restore, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(restore, "_read", lambda a, box, out: (boxes.append(box), read(a, box, out)))
    _, sums = restore.restore(step, abstract(P()))
    assert [b[0] for b in boxes if len(b) == 3] == [slice(i, i + 1) for i in range(8)]  # a layer is a chunk
    assert sums == checksums.read_seal(step)["sums"]


def test_what_is_given_away_on_one_device_stays_on_the_others(step):
    found = restore.restore(step, abstract(P()))[0]["params"]["layers"]["w"]
    pieces = [shard.data for shard in found.addressable_shards]
    assert not jax.block_until_ready(jax.jit(lambda x: x * 0, donate_argnums=0)(pieces[0])).any()
    assert pieces[0].is_deleted()
    np.testing.assert_array_equal(pieces[1], values()["layers"]["w"])


def test_a_state_in_the_host_s_memory_comes_back_there(step):
    found = restore.restore(step, abstract(P("a"), memory_kind="pinned_host"))[0]["params"]
    assert {x.sharding.memory_kind for x in jax.tree.leaves(found)} == {"pinned_host"}
    np.testing.assert_array_equal(found["layers"]["w"], values()["layers"]["w"])


def test_a_chunk_that_is_gone_is_an_error_and_not_zeros(tmp_path):
    from solar_jax.orbax_store.arrays import BlockWriter

    array = BlockWriter(tmp_path / "params", lambda n: None).create(
        "w", (4, 8), np.dtype(np.float32), (1, 8), fresh=True
    )
    array[:3].write(np.ones((3, 8), np.float32)).result()
    wanted = {"params": {"w": jax.ShapeDtypeStruct((4, 8), np.float32, sharding=ONE)}}
    with pytest.raises(ValueError, match=r"chunk|not found|NOT_FOUND"):
        restore.restore(tmp_path, wanted)
    array[3:].write(np.ones((1, 8), np.float32)).result()
    np.testing.assert_array_equal(restore.restore(tmp_path, wanted)[0]["params"]["w"], 1.0)


def restored(step, wanted, **config) -> tuple[dict, list[str]]:
    said: list[str] = []
    with CheckpointStore(step.parents[1], CheckpointConfig(**config), warn=said.append) as store:
        return store.restore_params(1, wanted["params"]), said


@pytest.mark.parametrize("spec", [P(), P("b", "a")], ids=str)
def test_orbax_gives_the_same_bits_where_the_config_asks_for_it(step, spec):
    wanted = abstract(spec)
    (ours, _), (theirs, said) = restored(step, wanted), restored(step, wanted, restore="orbax")
    assert said == []
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("options", [{"use_ocdbt": False}, {"use_zarr3": False}], ids=["files", "zarr2"])
def test_a_layout_that_we_do_not_read_is_restored_by_orbax(tmp_path, options):
    context = ocp.Context()
    for name, value in options.items():
        setattr(context.array.saving, name, value)
    with ocp.training.Checkpointer(str(tmp_path / FOLDER), context=context) as checkpointer:
        checkpointer.save_checkpointables(1, {"params": jax.device_put(values(), ONE)}, force=True)
    folder = tmp_path / FOLDER / "1"
    assert not layout_is_known(folder / "params")
    found, said = restored(folder, abstract(P("b")))
    assert [line.partition(": ")[2] for line in said] == ["is not zarr version 3 in OCDBT; Orbax restores it"]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(values()), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
