"""Checkpoints written block by block: what Orbax reads back is what `grow` makes, and no stacked array is ever held."""

import contextlib
import dataclasses
import json
import tracemalloc
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from solar_jax.checkpoints import checkpoint
from solar_jax.checkpoints.checkpoint import Checkpoint, from_params
from solar_jax.checkpoints.convert import Target
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tensor_table import paths
from solar_jax.checkpoints.views import cast, grown
from solar_jax.checkpoints.write_orbax import total_bytes, write_params
from solar_jax.config import GrowthConfig, ModelConfig
from solar_jax.convert import convert
from solar_jax.growth.apply import grow, grown_config
from solar_jax.growth.operators import OPERATORS, identity, make_layer_map
from solar_jax.model.shapes import Params, param_shapes
from solar_jax.orbax_store import arrays
from solar_jax.orbax_store.arrays import open_array
from solar_jax.orbax_store.layout import FOLDER
from solar_jax.orbax_store.store import CheckpointStore
from tests.growth.test_apply import GROWTHS, IDS, assert_same_bits

PLAIN = ModelConfig(320, 64, 96, 6, 4, 2, 24, 1024, 10000.0, 1e-5)
ALL = ModelConfig(320, 64, 96, 6, 4, 2, 24, 1024, 10000.0, 1e-5, attention_bias="qkvo", qk_norm=True)
TIED = ModelConfig(320, 64, 96, 6, 4, 2, 24, 1024, 10000.0, 1e-5, tie_word_embeddings=True)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def base(cfg: ModelConfig, dtype: str = "float32") -> Checkpoint:
    """Random numbers in every array."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(DTYPES[dtype]), param_shapes(cfg))
    return from_params(params, cfg, {}, {})


def written(workdir, c: Checkpoint, layer_map, dtype: str | None = None) -> Params:
    """The tree that Orbax reads of what is written."""
    told: list[int] = []
    c = cast(grown(c, layer_map), dtype)
    write_params(workdir, c, told.append)
    assert sum(told) == total_bytes(c)
    assert [f.name for f in workdir.iterdir()] == [FOLDER]
    return restored(workdir, c, layer_map, dtype)


def restored(workdir, c: Checkpoint, layer_map, dtype: str | None = None) -> Params:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kind = jnp.dtype(dtype or c.dtype)
    wanted = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, kind, sharding=one), param_shapes(grown_config(c.cfg, layer_map))
    )
    with CheckpointStore(workdir) as store:
        assert store.latest_step == 0
        return store.restore_params(0, wanted)


def test_every_operator_is_tried():
    assert {g.operator for g in GROWTHS} == set(OPERATORS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("growth", GROWTHS, ids=IDS)
def test_what_is_written_is_what_grow_makes_of_the_base(tmp_path, growth, dtype):
    c = base(PLAIN, dtype)
    layer_map = make_layer_map(6, growth)
    expected = grow(load_params(c, dtype=DTYPES[dtype]), layer_map)
    assert_same_bits(written(tmp_path, c, layer_map), expected)
    assert_same_bits(load_params(grown(c, layer_map), dtype=DTYPES[dtype]), expected)  # the way that training takes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_a_dtype_that_is_asked_for_is_rounded_to_after_growing(tmp_path, stored, dtype):
    c = base(PLAIN, stored)
    layer_map = make_layer_map(6, GrowthConfig("average", every=2))
    made = grow(load_params(c, dtype=DTYPES[stored]), layer_map)
    expected = jax.tree.map(lambda x: np.asarray(x).astype(DTYPES[dtype]), made)
    assert_same_bits(written(tmp_path, c, layer_map, dtype), expected)


def test_what_float16_cannot_hold_becomes_infinite_without_a_warning(tmp_path):
    c = base(PLAIN)
    params = load_params(c)
    params["final_norm"] = params["final_norm"].at[0].set(1e6)
    c = from_params(params, PLAIN, {}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = written(tmp_path, c, identity(6), "float16")
    assert np.isinf(np.asarray(found["final_norm"])[0])


# Elements of a block -> into how many blocks of rows each kind of array falls; 24 rows are a head.
BLOCKS = {
    64 * 128: {"embed": 3, "layers/q_proj": 1, "layers/gate_proj": 1, "lm_head": 3, "layers/q_bias": 1},
    64 * 40: {"embed": 8, "layers/q_proj": 4, "layers/k_proj": 2, "layers/o_proj": 3, "layers/down_proj": 3},
    30: {"embed": 320, "layers/q_proj": 4, "layers/q_bias": 4, "layers/attn_norm": 3, "layers/o_proj": 64},
    1: {"layers/q_bias": 4, "layers/k_bias": 2, "layers/attn_norm": 64, "layers/q_norm": 24, "final_norm": 64},
}


@pytest.mark.parametrize("cfg", [PLAIN, ALL, TIED], ids=["plain", "biases and norms", "tied"])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_size_of_blocks_changes_nothing_but_the_chunks(tmp_path, monkeypatch, cfg, block):
    c = base(cfg, "bfloat16")
    layer_map = make_layer_map(6, GrowthConfig("average", every=5))
    expected = grow(load_params(c, dtype=DTYPES["bfloat16"]), layer_map)
    monkeypatch.setattr(checkpoint, "BLOCK", block)
    assert_same_bits(written(tmp_path, c, layer_map), expected)
    for path in paths(cfg):
        array = open_array(tmp_path / FOLDER / "0" / "params", path)
        chunk = array.chunk_layout.read_chunk.shape
        parts = [-(-n // m) for n, m in zip(array.shape, chunk, strict=True)]
        if path.startswith("layers/"):
            assert parts.pop(0) == 7  # a layer to a chunk
        assert sorted(parts)[:-1] == [1] * (len(parts) - 1)  # cut along one axis, the file's rows
        assert max(parts) == BLOCKS[block].get(path, max(parts)), path


@pytest.mark.parametrize("growth", [GrowthConfig("dus", m=2), GrowthConfig("zeroed", m=2)], ids=["dus", "zeroed"])
def test_a_layer_that_stands_in_several_places_is_read_once(tmp_path, growth):
    read: list[str] = []
    c = base(PLAIN)
    counted = from_params(load_params(c), PLAIN, {}, {})
    object.__setattr__(counted, "read", lambda name, rows=slice(None): read.append(name) or c.read(name, rows))
    layer_map = make_layer_map(6, growth)
    written(tmp_path, counted, layer_map)
    most = 1 if growth.operator == "dus" else 2  # once as it is, once for all the places where it is scaled by zero
    assert set(c.shape_of) == set(read)
    assert max(read.count(name) for name in read) == most
    assert max(read.count(name) for name in read if "up_proj" in name) == 1


def test_tensors_of_several_dtypes_in_one_array_become_float32_and_no_other(tmp_path):
    c = base(PLAIN, "bfloat16")
    wide = "model.layers.2.mlp.up_proj.weight"
    mixed = Checkpoint(**vars(c) | {"dtype_of": c.dtype_of | {wide: np.dtype(np.float32)}})
    extra = np.float32(c.read(wide)) + np.float32(1e-5)
    object.__setattr__(
        mixed, "read", lambda name, rows=slice(None): extra[rows] if name == wide else c.read(name, rows)
    )
    write_params(tmp_path, mixed, lambda n: None)
    folder = tmp_path / FOLDER / "0" / "params"
    found = {path: open_array(folder, path) for path in paths(PLAIN)}
    assert {path for path, x in found.items() if x.dtype.name == "float32"} == {"layers/up_proj"}
    expected = load_params(mixed)["layers"]["up_proj"]
    assert_same_bits(found["layers/up_proj"].read().result(), np.asarray(expected))


# ---- Going on -------------------------------------------------------------------------------------------------------


def interrupted(workdir, c: Checkpoint, layer_map, monkeypatch, after: int) -> int:
    """An import that is stopped after so many blocks; how many chunks are stored then."""
    calls, view = iter(range(10**9)), grown(c, layer_map)

    def read(*args):
        if next(calls) >= after:
            raise KeyboardInterrupt
        return view.read(*args)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(arrays, "_PENDING_BYTES", 1)  # each block is on disk before the next is handed over
        write_params(workdir, dataclasses.replace(view, read=read), lambda n: None)
    return sum(map(len, arrays.chunks(workdir / FOLDER / "0" / "params").values()))


@pytest.mark.parametrize("lost", [None, "embed/c/0/0", "embed/zarr.json"])
def test_an_import_goes_on_where_it_was_stopped(tmp_path, monkeypatch, lost):
    c, layer_map = base(ALL), make_layer_map(6, GrowthConfig("average", every=2))
    before = 0
    for after in (10, 20, 30):
        stored = interrupted(tmp_path, c, layer_map, monkeypatch, after)
        assert stored > before + 5
        before = stored
    if lost:  # stopped before this chunk was stored, or while the array was being created
        store = ts.KvStore.open(arrays._key_value_store(tmp_path / FOLDER / "0" / "params")).result()
        assert store.read(lost).result().state == "value"
        store.delete_range(ts.KvStore.KeyRange(lost, lost + "\0")).result()
    read: list[str] = []
    counted = Checkpoint(**vars(c) | {"read": lambda name, rows=slice(None): read.append(name) or c.read(name, rows)})
    found = written(tmp_path, counted, layer_map)
    assert ("model.embed_tokens.weight" in read) == bool(lost)
    assert "model.layers.0.mlp.up_proj.weight" in read
    assert_same_bits(found, grow(load_params(c), layer_map))


def test_a_second_stop_before_anything_new_loses_nothing(tmp_path, monkeypatch):
    c, layer_map = base(PLAIN), identity(6)
    first = interrupted(tmp_path, c, layer_map, monkeypatch, 20)
    assert interrupted(tmp_path, c, layer_map, monkeypatch, 0) == first
    assert_same_bits(written(tmp_path, c, layer_map), load_params(c))


def test_what_is_on_its_way_when_one_write_fails_is_waited_for(tmp_path, monkeypatch):
    """So that nothing is written into a folder that is being removed."""
    c, done = base(PLAIN), []
    original = arrays.BlockWriter.write

    def write(self, array, index, block):
        original(self, array, index, block)
        done.append(self._pending[-1][0])
        if len(done) == 30:
            raise ValueError("no")

    monkeypatch.setattr(arrays.BlockWriter, "write", write)
    with pytest.raises(ValueError, match="no"):
        write_params(tmp_path, c, lambda n: None)
    assert all(future.done() for future in done)


# ---- Memory and places ----------------------------------------------------------------------------------------------


def test_a_stacked_array_is_never_held(tmp_path, monkeypatch):
    """26 layers of 12 MB in 1 MB blocks; numpy's memory is what tracemalloc counts."""
    cfg = ModelConfig(64, 512, 1536, 26, 8, 8, 64, 1024, 10000.0, 1e-5)
    block = np.random.default_rng(0).standard_normal((1536, 1536)).astype(np.float32)

    def read(name: str, rows: slice = slice(None)) -> np.ndarray:
        shape = c.shape_of[name]
        start, stop, _ = rows.indices(shape[0])
        return block[: stop - start, : shape[1]].copy() if len(shape) == 2 else block[0, start:stop].copy()

    empty = jax.tree.map(
        lambda s: np.empty(s.shape, np.float32), param_shapes(ModelConfig(**vars(cfg) | {"num_hidden_layers": 1}))
    )
    c = from_params(empty, ModelConfig(**vars(cfg) | {"num_hidden_layers": 1}), {}, {})
    c = Checkpoint(**vars(c) | {"read": read})
    layer_map = make_layer_map(1, GrowthConfig("naive", copies=26))
    monkeypatch.setattr(checkpoint, "BLOCK", 1 << 18)
    monkeypatch.setattr(arrays, "_PENDING_BYTES", 1 << 23)
    stacked = max(s.size * 4 for s in jax.tree.leaves(param_shapes(cfg)["layers"]))
    assert stacked > 80e6
    write_params(tmp_path / "warm", base(PLAIN), lambda n: None)
    tracemalloc.start()
    try:
        write_params(tmp_path / "x", grown(c, layer_map), lambda n: None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30e6


@pytest.mark.parametrize("name", ["a b", "100%", "a%20b", "a?b#c", "ü", "[x]", "a&b=c", "'\"", "~", "*"])
def test_any_name_of_a_folder_will_do(tmp_path, tiny, name):
    out = tmp_path / name / "own"
    convert(str(tiny), Target(out, "orbax"))
    assert [f.name for f in tmp_path.iterdir()] == [name]
    found, expected = open_checkpoint(str(out)), open_checkpoint(str(tiny))
    for tensor in ("model.norm.weight", "model.layers.3.self_attn.q_proj.weight"):
        np.testing.assert_array_equal(found.read(tensor), expected.read(tensor))
    assert json.loads((out / "model" / "config.json").read_text()) == expected.hf_config


def test_a_flipped_bit_of_a_chunk_is_an_error_for_us_and_for_orbax(tmp_path):
    c = base(PLAIN)
    write_params(tmp_path, c, lambda n: None)
    folder = tmp_path / FOLDER / "0" / "params"
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one), param_shapes(PLAIN))
    with ocp.training.Checkpointer(str(tmp_path / FOLDER)) as store:
        assert_same_bits(store.load_checkpointables(0, {"params": abstract})["params"], load_params(c))
    # Within a weight, so that nothing but a chunk's checksum can tell.
    weight = c.read("model.embed_tokens.weight").tobytes()[:64]
    (data,) = (f for f in folder.rglob("d/*") if weight in f.read_bytes())
    content = bytearray(data.read_bytes())
    content[content.index(weight) + 3] ^= 0x10
    data.write_bytes(content)
    with pytest.raises(ValueError, match=r"(?i)crc|checksum|data_loss"):
        open_array(folder, "embed").read().result()
    with ocp.training.Checkpointer(str(tmp_path / FOLDER)) as store, pytest.raises(KeyError, match=r"params"):
        store.load_checkpointables(0, {"params": abstract})
