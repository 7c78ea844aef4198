"""Checkpoints in a bucket, against an emulator on loopback that can be told to fail."""

import collections
import contextlib
import json
import logging
import os
import pathlib

import pytest
import safetensors.torch
import torch
from etils import epath
from gcp_storage_emulator.server import create_server

from solar_jax import convert, upscale
from solar_jax.config import GrowthConfig
from solar_jax.conversion import Target
from solar_jax.errors import UserError
from solar_jax.hf import buckets
from solar_jax.source import open_checkpoint

PORT = 9023
LIMIT = "100KB"  # several shards


@pytest.fixture(scope="module")
def bucket():
    """A new bucket's URL."""
    os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{PORT}"
    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it looks for credentials, which the emulator does without
    server = create_server("127.0.0.1", PORT, in_memory=True, default_bucket="models")
    server.start()
    yield "gs://models"
    server.stop()
    del os.environ["STORAGE_EMULATOR_HOST"]


@pytest.fixture(scope="module")
def source(bucket, tiny) -> str:
    folder = epath.Path(f"{bucket}/source")
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(buckets, "_FIRST_WAIT", 0.0)


def tensors(folder) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.torch.load(file.read_bytes())
    return found


def names(folder) -> set[str]:
    return {p.name for p in folder.iterdir()}


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
    for name in names(out) - {"lineage.json", "certificate.json"}:
        assert (out / name).read_bytes() == (tmp_path / "grown" / name).read_bytes()
    with pytest.raises(UserError, match="already exists"):
        grow(source, out)


def test_an_orbax_checkpoint_in_a_bucket_is_refused_before_anything_is_written(bucket, source):
    with pytest.raises(UserError, match="local folder"):
        convert.convert(source, Target(epath.Path(f"{bucket}/own"), "orbax"))
    assert not epath.Path(f"{bucket}/own").exists()


def test_an_upload_that_fails_now_and_then_loses_nothing(bucket, source, monkeypatch, tmp_path):
    upload, calls = buckets._upload, collections.Counter()

    def sometimes(file: pathlib.Path, target: pathlib.Path) -> None:
        calls[target.name] += 1
        if calls[target.name] % 3:  # two threads upload, each object by one of them
            raise ConnectionResetError("injected")
        upload(file, target)

    monkeypatch.setattr(buckets, "_upload", sometimes)
    out = epath.Path(f"{bucket}/flaky")
    grow(source, out)
    grow(source, tmp_path / "grown")
    assert {k: v.numpy().tobytes() for k, v in tensors(out).items()} == {
        k: v.numpy().tobytes() for k, v in tensors(tmp_path / "grown").items()
    }


def test_an_upload_that_stops_leaves_no_checkpoint_and_goes_on_later(bucket, source, monkeypatch, tmp_path):
    out = epath.Path(f"{bucket}/stopped")
    upload, done = buckets._upload, []

    def until_third(file: pathlib.Path, target: pathlib.Path) -> None:
        if len(done) >= 3:  # two threads upload
            raise ConnectionResetError("injected")
        upload(file, target)
        done.append(target.name)

    with monkeypatch.context() as m:
        m.setattr(buckets, "_upload", until_third)
        with pytest.raises(UserError, match="the bucket failed 4 times"):
            grow(source, out)
    assert "config.json" not in names(out)
    with contextlib.suppress(UserError):
        open_checkpoint(str(out))
        pytest.fail("a half-written folder was opened as a checkpoint")
    again: list[str] = []
    monkeypatch.setattr(buckets, "_upload", lambda file, target: (again.append(target.name), upload(file, target)))
    grow(source, out)
    assert not set(done) & set(again)  # what was there was not sent again
    grow(source, tmp_path / "grown")
    assert names(out) == names(tmp_path / "grown")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 10


def test_a_bucket_that_is_not_there_is_named(bucket):
    with pytest.raises(UserError, match="gs://models/nothing: no such folder"):
        open_checkpoint(f"{bucket}/nothing")
