"""Conversions that the system kills in the middle: nothing has the target's name, and the same command completes it."""

import json
import pathlib
import random
import subprocess
import sys
import time

import pytest

from solar_jax.errors import UserError
from solar_jax.hf.folders import partial
from solar_jax.source import open_checkpoint
from tests.conftest import hf_model, save_hf

ROOT = pathlib.Path(__file__).parents[1]


def names(folder: pathlib.Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> pathlib.Path:
    """Some 190 MB, so that there is something to interrupt."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "vocab_size": 8000}
    model = hf_model(**sizes, num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    return save_hf(model, tmp_path_factory.mktemp("large") / "hf")


def steps_done(folder: pathlib.Path) -> int:
    """Shards, or arrays of layers, that a process has finished."""
    log = folder / "written.txt"
    return len(list(folder.glob("*.safetensors"))) + (len(log.read_text().split("\n\n")) if log.exists() else 0)


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file, and of a checkpoint of ours every tensor; of the lineage what does not tell one run from another."""
    found = {}
    for file in folder.rglob("*"):
        if file.name == "lineage.json":
            record = json.loads(file.read_text())
            del record["date"], record["command"]
            found[file.name] = json.dumps(record).encode()
        elif file.is_file() and "checkpoints" not in file.parts:
            found[str(file.relative_to(folder))] = file.read_bytes()
    if (folder / "checkpoints").exists():
        c = open_checkpoint(str(folder))
        found |= {name: c.read(name).tobytes() for name in c.shape_of}
    return found


COMMANDS = {
    "copied": "upscale --operator=dus --m=3 --max_shard_size=4MB",
    "cast": "convert --to=hf --dtype=bfloat16 --max_shard_size=2MB",
    "orbax": "convert --to=orbax --operator=dus --m=3",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_kill_9_at_any_moment_then_the_same_command_completes_the_same_bytes(tmp_path, large, name):
    module, *flags = COMMANDS[name].split()
    command = [sys.executable, "-m", f"solar_jax.{module}", f"--source={large}", *flags]
    whole, out = tmp_path / "whole", tmp_path / "killed" / "out"
    done = subprocess.run([*command, f"--out={whole}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    total = len(list(whole.glob("*.safetensors"))) or 9 * 12 + 3
    rng, kills = random.Random(name), 0
    for part in (0, 0.1, 0.35, 0.6, 0.85):
        process = subprocess.Popen([*command, f"--out={out}"], cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (partial(out).exists() and steps_done(partial(out)) >= part * total):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
        assert names(out.parent) == [".out.partial"]
        with pytest.raises(UserError, match="no such checkpoint"):
            open_checkpoint(str(out))
    assert kills >= 3
    kept = {f: f.stat().st_mtime_ns for f in partial(out).glob("*.safetensors")}
    if not out.exists():
        again = subprocess.run([*command, f"--out={out}"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr
    assert names(out.parent) == ["out"]
    assert content(out) == content(whole)
    for file, written in kept.items():
        assert (out / file.name).stat().st_mtime_ns == written
    assert len(kept) > total / 2 or name == "orbax"
