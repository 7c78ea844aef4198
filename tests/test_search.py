"""The search command: its file, picture and refusals, and that a killed one goes on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from solar_jax.config import Config, DataConfig
from solar_jax.errors import UserError
from solar_jax.searching.find import SearchSettings
from solar_jax.searching.run import search_cuts
from tests.conftest import save_model_and_text

REPO = pathlib.Path(__file__).parents[1]
SETTINGS = SearchSettings(2, forwards=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return save_model_and_text(tmp_path_factory.mktemp("search"), 1500)


def config_of(folder: pathlib.Path) -> Config:
    data = DataConfig(sources=(str(folder / "corpus.txt"),), holdout="position", sequence_length=64)
    return Config(source=str(folder / "model"), data=data)


def searched(folder: pathlib.Path, out: pathlib.Path, settings: SearchSettings = SETTINGS, **more) -> dict:
    return search_cuts(config_of(folder), settings, out, **({"other": "python-stdlib"} | more), tokens=512, windows=4)


def ask(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "solar_jax.search", *args], cwd=REPO, capture_output=True, text=True, check=False
    )


def dated(content: dict) -> dict:
    """The content without its date."""
    return {key: value for key, value in content.items() if key != "date"}


def test_the_file_holds_what_was_found_and_the_next_command_is_printed(folder, tmp_path, capsys):
    out = tmp_path / "new" / "found.json"
    content = searched(folder, out)
    assert json.loads(out.read_text()) == content
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in out.parent.iterdir()} == {"found.json", "found.png"}  # the store is gone
    best, dus = content["best"], content["dus"]
    assert dus["source_layers"] == [0, 1, 2, 1, 2, 3]  # dus(1) of 4 layers
    assert len(best["source_layers"]) == 6
    assert best["excess"] == pytest.approx(best["loss"] - content["base_loss"])
    assert best["blocks"] in {row["blocks"] for row in content["candidates"]}
    assert content["text"]["tokens"] > 400
    assert {one["text"] for one in content["confirmed"]} == {"corpus.txt held out", "python-stdlib"}
    for one in content["confirmed"]:
        assert {"base", "best", "dus", "best_minus_dus", "tokens", "documents", "sha256"} <= set(one)
    assert content["settings"] == {"add": 2, "forwards": 12, "finalists": 5, "dtype": "float32", "scale": 1.0}
    assert str(folder) not in json.dumps(content["source"])
    said = capsys.readouterr().out
    assert f"solar_jax.upscale --source {folder / 'model'} --out DIR --slices {best['slices']}\n" in said
    assert f"--config.growth.operator=slices --config.growth.slices={best['slices']} " in said

    # The same command says what is there; another is not written over it.
    assert searched(folder, out) == content
    with pytest.raises(UserError, match=r"holds another result"):
        searched(folder, out, SearchSettings(1, forwards=1))
    assert searched(folder, out, SearchSettings(1, forwards=1), overwrite=True)["dus"]["blocks"] == "1:2"


def test_more_layers_than_the_base_has_are_visits(folder, tmp_path):
    content = searched(folder, tmp_path / "deep.json", SearchSettings(9, forwards=6))
    assert content["dus"] is None
    assert len(content["best"]["source_layers"]) == 13
    assert "x" in content["best"]["blocks"]


@pytest.mark.slow  # two processes
def test_a_killed_search_goes_on_and_gives_the_same_file(folder, tmp_path):
    out, alone = tmp_path / "killed.json", tmp_path / "alone.json"
    args = [
        "--source", str(folder / "model"), "--text", str(folder / "corpus.txt"), "--add=2", "--length=64",
        "--tokens=512", "--windows=4", "--forwards=12", "--out",
    ]  # fmt: skip
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen([sys.executable, "-m", "solar_jax.search", *args, str(out)], cwd=REPO, env=env)
    while not (kept := list(tmp_path.glob(".killed.json.*"))) or len(kept[0].read_text().splitlines()) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    before = len(kept[0].read_text().splitlines())
    assert before >= 6
    for file in (out, alone):
        subprocess.run([sys.executable, "-m", "solar_jax.search", *args, str(file)], cwd=REPO, env=env, check=True)
    assert dated(json.loads(out.read_text())) == dated(json.loads(alone.read_text()))
    assert not kept[0].exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--source=smollm2", "--add=0", "--out=x.json"], "--add must be at least 1"),
        (["--source=smollm2", "--add=18", "--beta=0.5", "--out=x.json"], "with beta = 0 any cut is perfect"),
        (["--source=smollm2", "--add=18", "--scale=0", "--out=x.json"], "with scale = 0 any cut is perfect"),
        (["--source=smollm2", "--out=x.json"], "search needs"),
        (["--source=smollm2", "--add=18", "--out=x"], "--out must end in .json"),
        (["--source=smollm2", "--add=18", "--text=/not/there", "--out=x.json"], "/not/there"),
        (["--source=smollm2", "--add=18", "--slice=v5e-8", "--out=x.json"], "add --dry_run"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(args, sentence):
    done = ask(*args)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (REPO / "x.json").exists()


def test_a_slice_is_priced_without_weights():
    done = ask("--config=configs/dus_48l.py", "--add=16", "--slice=v5e-8", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "layer forwards of" in done.stdout
    assert "GiB a device" in done.stdout
    done = ask("--config=configs/dus_48l.py", "--add=16", "--slice=v5e-1", "--dry_run", "--dtype=float32")
    assert done.returncode == 2
    assert "GiB a device, but each of the 1" in done.stderr
