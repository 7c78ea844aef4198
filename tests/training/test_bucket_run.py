"""Whole runs in a bucket, against an emulator on loopback that fails when it is told to."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from solar_jax import retrying, train
from solar_jax.errors import UserError
from tests.bucket import serving
from tests.test_train import make_config

LOSSES = ("base_loss", "zero_token_loss", "final_loss", "control_loss")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(retrying, "FIRST_WAIT", 0.05)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text(" ".join(np.random.default_rng(0).choice(["depth", "up", "scaling", "grows", "a"], 3000)))
    return file


def metrics(folder) -> list[tuple]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"], r["learning_rate"], r["tokens"]) for r in lines]


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def config_of(tiny, text, **changes):
    return make_config(tiny, text, checkpoint_every=2, checkpoint_keep=2, **changes)


def moved(config, text, url):
    """The config with its text in the bucket."""
    there = epath.Path(f"{url}/corpus.txt")
    there.write_text(text.read_text())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(str(there),)))


def assert_same_run(folder, local, parts=("",)) -> None:
    for part in parts:
        assert metrics(folder / part) == metrics(local / part)
        assert names(folder / part / "checkpoints") == names(local / part / "checkpoints") == ["4", "6"]
        for step in ("4", "6"):
            assert (folder / part / "checkpoints" / step / "verified.json").exists()
    found, expected = (json.loads((f / "summary.json").read_text()) for f in (folder, local))
    assert [found[key] for key in LOSSES] == [expected[key] for key in LOSSES]
    assert (folder / "hf/model.safetensors").read_bytes() == (local / "hf/model.safetensors").read_bytes()
    assert names(folder) == names(local)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_damaged_checkpoint_in_a_bucket_is_left_out_by_name(tiny, text, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    config = config_of(tiny, text, train_control=False)
    train.run(config, tmp_path / "run")
    with serving() as (url, _, _, _):
        folder, config = epath.Path(f"{url}/run"), moved(config, text, url)
        train.run(config, folder)
        (folder / "summary.json").unlink()
        file = next(f for f in (folder / "checkpoints/6/params/d").iterdir())
        file.write_bytes(file.read_bytes()[:-7])
        train.run(config, folder)
        told = capfd.readouterr()
        assert f"{folder}/checkpoints/6: is left out" in told.err
        assert "going on from the checkpoint of step 4" in told.out
        assert_same_run(folder, tmp_path / "run")


def test_a_workdir_in_s3_is_refused_in_one_sentence(tiny, text):
    with pytest.raises(UserError, match=r"s3://b/run: checkpoints go to a local folder or to gs://"):
        train.run(config_of(tiny, text), epath.Path("s3://b/run"))
