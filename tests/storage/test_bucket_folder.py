"""Checkpoints in a bucket, against an emulator on loopback that can be told to fail."""

import collections
import contextlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from etils import epath

from solar_jax import convert, upscale
from solar_jax.checkpoints import hf_folder
from solar_jax.checkpoints.convert import Target
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.views import grown
from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError
from solar_jax.formats.safetensors import read_tensor
from solar_jax.growth.operators import make_layer_map
from solar_jax.orbax_store import arrays
from solar_jax.orbax_store.store import CheckpointStore
from solar_jax.storage import bucket_folder, retry

LIMIT = "100KB"  # several shards


@pytest.fixture(scope="module")
def source(bucket, tiny) -> str:
    folder = epath.Path(f"{bucket}/source")
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)


def tensors(folder) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.torch.load(file.read_bytes())
    return found


def names(folder) -> set[str]:
    return {p.name for p in folder.iterdir()}


def files(folder) -> list:
    """All objects under a folder of a bucket."""
    return [f for p in folder.iterdir() for f in (files(p) if p.is_dir() else [p])]


def grow(source, out, **kwargs) -> None:
    upscale.upscale(source, GrowthConfig("dus", m=1), Target(out, max_shard_size=LIMIT), **kwargs)


def test_a_checkpoint_in_a_bucket_is_read_as_the_local_one(source, tiny):
    there, here = open_checkpoint(source), open_checkpoint(str(tiny))
    assert (there.cfg, there.hf_config, there.companions) == (here.cfg, here.hf_config, here.companions)
    for name in here.shape_of:
        assert there.read(name).tobytes() == here.read(name).tobytes()
        assert there.read(name, slice(1, 3)).tobytes() == here.read(name, slice(1, 3)).tobytes()


def test_a_checkpoint_is_written_to_a_bucket_as_to_a_folder(bucket, source, tmp_path):
    out = epath.Path(f"{bucket}/grown")
    grow(source, out, verify=True)
    grow(source, tmp_path / "grown", verify=True)
    assert names(out) == names(tmp_path / "grown")
    for name in names(out) - {"lineage.json", "certificate.json", "README.md"}:
        assert (out / name).read_bytes() == (tmp_path / "grown" / name).read_bytes()
    with pytest.raises(UserError, match="already exists"):
        grow(source, out)


def orbax(source, out, **kwargs) -> None:
    convert.convert(source, Target(out, "orbax", **kwargs.pop("target", {})), GrowthConfig("dus", m=1), **kwargs)


def all_tensors(folder) -> dict[str, bytes]:
    c = open_checkpoint(str(folder))
    return {name: c.read(name).tobytes() for name in c.shape_of}


def test_an_orbax_checkpoint_is_written_to_a_bucket_and_read_there_as_the_local_one(bucket, source, tmp_path):
    out = epath.Path(f"{bucket}/100% own")
    orbax(source, out, verify=True)
    orbax(source, tmp_path / "own")
    assert names(out) == names(tmp_path / "own") == {"checkpoints", "model"}
    assert names(out / "model") == names(tmp_path / "own" / "model") | {"certificate.json"}
    assert all_tensors(out) == all_tensors(tmp_path / "own")
    convert.convert(str(out), Target(epath.Path(f"{bucket}/back"), max_shard_size=LIMIT))
    grow(source, tmp_path / "grown")
    assert all_tensors(f"{bucket}/back") == all_tensors(tmp_path / "grown")
    with pytest.raises(UserError, match="already exists"):
        orbax(source, out)
    orbax(source, out, target={"overwrite": True, "dtype": "bfloat16"})
    assert open_checkpoint(str(out)).common_dtype == "bfloat16"


def test_orbax_reads_what_is_in_the_bucket(bucket, source, tmp_path):
    """The files, fetched as they are: TensorStore alone would not miss one that Orbax asks for."""

    def as_it_is(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    out = epath.Path(f"{bucket}/own2")
    orbax(source, out)
    for there in files(out / "checkpoints"):
        here = tmp_path / "own2" / there.relative_to(out)
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_bytes(there.read_bytes())
    expected = load_params(grown(open_checkpoint(source), make_layer_map(6, GrowthConfig("dus", m=1))))
    with CheckpointStore(tmp_path / "own2") as store:
        found = store.restore_params(0, jax.tree.map(as_it_is, expected))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_an_orbax_checkpoint_whose_writing_stopped_is_none_and_is_gone_on_with(bucket, source, monkeypatch):
    out, read = epath.Path(f"{bucket}/stopped_own"), []
    original = read_tensor

    def until(name, entry, rows=slice(None)):
        if len(read) == 30:
            raise KeyboardInterrupt
        read.append((name, rows.start))
        return original(name, entry, rows)

    with monkeypatch.context() as m:
        m.setattr(hf_folder, "read_tensor", until)
        m.setattr(arrays, "_PENDING_BYTES", 1)  # each block is there before the next is handed over
        with pytest.raises(KeyboardInterrupt):
            orbax(source, out)
    with pytest.raises(UserError):
        open_checkpoint(str(out))
    first, read[:] = list(read), [None] * 31
    monkeypatch.setattr(hf_folder, "read_tensor", until)
    orbax(source, out)
    assert len(set(first) - set(read)) > 20  # what was there was not read again
    found, expected = open_checkpoint(str(out)), open_checkpoint(source)
    for i, layer in enumerate([*range(5), *range(1, 6)]):
        name = "model.layers.{}.mlp.up_proj.weight"
        np.testing.assert_array_equal(found.read(name.format(i)), expected.read(name.format(layer)))


@pytest.mark.parametrize("client", ["tensorstore", "gcsfs"])
def test_an_orbax_checkpoint_that_a_bucket_refuses_is_one_sentence_and_none(emulated, source, monkeypatch, client):
    bucket, faults = emulated
    out = epath.Path(f"{bucket}/refused {client}")
    monkeypatch.setattr(faults, "refused", client)
    with pytest.raises(UserError, match=f"gs://models/refused {client}.*: the bucket failed"):
        orbax(source, out)
    with pytest.raises(UserError):
        open_checkpoint(str(out))


def test_a_folder_of_a_bucket_that_is_no_checkpoint_is_not_replaced(bucket, source):
    out = epath.Path(f"{bucket}/letters")
    (out / "model.txt").write_text("dear")
    with pytest.raises(UserError, match="not a checkpoint"):
        orbax(source, out, target={"overwrite": True})
    assert names(out) == {"model.txt"}


def test_a_disk_without_room_for_the_shards_is_told_before_any_is_sent(bucket, source, monkeypatch):
    out, usage = epath.Path(f"{bucket}/roomless"), shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=199_999))  # two of LIMIT's
    with pytest.raises(UserError, match="GB of disk, but"):
        grow(source, out)
    assert not out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=200_000))
    grow(source, out)


def test_an_upload_that_fails_now_and_then_loses_nothing(bucket, source, monkeypatch, tmp_path):
    upload, calls = bucket_folder._upload, collections.Counter()

    def sometimes(file: pathlib.Path, target: pathlib.Path) -> None:
        calls[target.name] += 1
        if calls[target.name] % 3:  # two threads upload, each object by one of them
            raise ConnectionResetError("injected")
        upload(file, target)

    monkeypatch.setattr(bucket_folder, "_upload", sometimes)
    out = epath.Path(f"{bucket}/flaky")
    grow(source, out)
    grow(source, tmp_path / "grown")
    assert {k: v.numpy().tobytes() for k, v in tensors(out).items()} == {
        k: v.numpy().tobytes() for k, v in tensors(tmp_path / "grown").items()
    }


def test_an_upload_that_stops_leaves_no_checkpoint_and_goes_on_later(bucket, source, monkeypatch, tmp_path):
    out = epath.Path(f"{bucket}/stopped")
    upload, done = bucket_folder._upload, []

    def until_third(file: pathlib.Path, target: pathlib.Path) -> None:
        if len(done) >= 3:  # two threads upload
            raise ConnectionResetError("injected")
        upload(file, target)
        done.append(target.name)

    with monkeypatch.context() as m:
        m.setattr(bucket_folder, "_upload", until_third)
        with pytest.raises(UserError, match="the bucket failed 4 times"):
            grow(source, out)
    assert "config.json" not in names(out)
    with contextlib.suppress(UserError):
        open_checkpoint(str(out))
        pytest.fail("a half-written folder was opened as a checkpoint")
    again: list[str] = []
    monkeypatch.setattr(
        bucket_folder, "_upload", lambda file, target: (again.append(target.name), upload(file, target))
    )
    grow(source, out)
    assert not set(done) & set(again)  # what was there was not sent again
    grow(source, tmp_path / "grown")
    assert names(out) == names(tmp_path / "grown")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 10


def test_a_bucket_that_is_not_there_is_named(bucket):
    with pytest.raises(UserError, match="gs://models/nothing: no such folder"):
        open_checkpoint(f"{bucket}/nothing")
