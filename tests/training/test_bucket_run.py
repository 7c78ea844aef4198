"""Whole runs in a bucket, against an emulator on loopback that fails when it is told to."""

import asyncio
import dataclasses
import json
import re
import types

import gcsfs
import pytest
from etils import epath

from solar_jax import train
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.errors import UserError
from solar_jax.orbax_store.store import CheckpointStore
from solar_jax.storage import retry
from tests.test_train import make_config, metrics

LOSSES = ("base_loss", "zero_token_loss", "final_loss", "control_loss")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.05)


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def config_of(tiny, text):
    return make_config(tiny, text, train_control=False, checkpoint_every=2, checkpoint_keep=2)


@pytest.fixture(scope="module")
def local(tiny, text, tmp_path_factory):
    """The run that the others must repeat, in a local folder."""
    folder = tmp_path_factory.mktemp("local") / "run"
    train.run(config_of(tiny, text), folder)
    return folder


def moved(config, text, url):
    """The config with its text in the bucket."""
    there = epath.Path(f"{url}/corpus.txt")
    there.write_text(text.read_text())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(str(there),)))


def assert_same_run(folder, local) -> None:
    assert metrics(folder) == metrics(local)
    assert names(local / "checkpoints") == ["4", "6"]
    assert names(folder / "checkpoints") == ["4", "6"]
    for step in ("4", "6"):
        assert (folder / "checkpoints" / step / "verified.json").exists()
    found, expected = (json.loads((f / "summary.json").read_text()) for f in (folder, local))
    assert [found[key] for key in LOSSES] == [expected[key] for key in LOSSES]
    assert (folder / "hf/model.safetensors").read_bytes() == (local / "hf/model.safetensors").read_bytes()
    assert names(folder) == names(local)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_in_a_bucket_that_fails_all_along_is_the_local_one(emulated, tiny, text, local, monkeypatch):
    url, faults = emulated
    folder, config = epath.Path(f"{url}/failing"), moved(config_of(tiny, text), text, url)
    monkeypatch.chdir(local.parent)
    with monkeypatch.context() as m:
        m.setattr(faults, "every", 151)
        train.run(config, folder)
    assert_same_run(folder, local)
    assert faults.counts["503"] > 10
    assert faults.counts["reset"] > 2
    assert open_checkpoint(str(folder)).cfg.num_hidden_layers == 8  # its newest checkpoint, as a model


@pytest.mark.slow
def test_a_bucket_that_stays_away_ends_the_run_in_one_sentence_and_costs_no_checkpoint(
    emulated, tiny, text, local, tmp_path, monkeypatch
):
    url, faults = emulated
    folder, config = epath.Path(f"{url}/away"), moved(config_of(tiny, text), text, url)
    monkeypatch.chdir(tmp_path)
    seal, sealed = CheckpointStore._seal, []

    def seal_and_go(store, step, total):
        seal(store, step, total)
        sealed.append(step)
        if step >= 4:
            faults.every = 1

    with monkeypatch.context() as m:
        m.setattr(faults, "every", 0)
        m.setattr(CheckpointStore, "_seal", seal_and_go)
        m.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=lambda _: asyncio.sleep(0.01)))  # not of seconds
        with pytest.raises(UserError) as told:
            train.run(config, folder)
    sentence = str(told.value)
    assert re.fullmatch(
        rf"{folder}/(metrics|evals)\.jsonl: the bucket failed 4 times \(.*(503|reset).*\); the last good checkpoint "
        rf"is that of step {sealed[-1]}, and the same command resumes from there\.",
        sentence,
    ), sentence
    assert str(sealed[-1]) in names(folder / "checkpoints")
    train.run(config, folder)
    assert_same_run(folder, local)


@pytest.mark.slow
def test_a_damaged_checkpoint_in_a_bucket_is_left_out_by_name(
    emulated, tiny, text, local, tmp_path, monkeypatch, capfd
):
    folder, config = epath.Path(f"{emulated[0]}/damaged"), moved(config_of(tiny, text), text, emulated[0])
    monkeypatch.chdir(tmp_path)
    train.run(config, folder)
    (folder / "summary.json").unlink()
    file = next(f for f in (folder / "checkpoints/6/params/d").iterdir())
    file.write_bytes(file.read_bytes()[:-7])
    train.run(config, folder)
    told = capfd.readouterr()
    assert f"{folder}/checkpoints/6: skipped" in told.err
    assert "resuming from the checkpoint of step 4" in told.out
    assert_same_run(folder, local)


def test_a_workdir_in_s3_is_refused_in_one_sentence(tiny, text):
    with pytest.raises(UserError, match=r"s3://b/run: checkpoints go to a local folder or to gs://"):
        train.run(config_of(tiny, text), epath.Path("s3://b/run"))
