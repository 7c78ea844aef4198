"""Conversions that the system kills in the middle: nothing has the target's name, and the same command completes it."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import pytest

from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.errors import UserError
from solar_jax.storage.atomic_folder import partial
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


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file, and of a checkpoint of ours every tensor; of the lineage what does not tell one run from another."""
    found = {}
    for file in folder.rglob("*"):
        if file.name == "README.md":
            name = folder.name  # in the title, and where it is loaded
            found[file.name] = file.read_text().replace(f"# {name}\n", "").replace(f'"{name}"', "").encode()
        elif file.name == "lineage.json":
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
    "orbax": "convert --to=orbax --operator=dus --m=3",
}


# As `python -m`, but Orbax's files of 4 MB, so that many reach the disk before the last.
RUN = """
import runpy, sys
from solar_jax.orbax_store import arrays
arrays.DATA_FILE_BYTES, arrays._PENDING_BYTES = 1 << 22, 1 << 23
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def start(name: str, source: pathlib.Path, out: pathlib.Path) -> subprocess.Popen:
    module, *flags = COMMANDS[name].split()
    python = ["-c", RUN, f"solar_jax.{module}"] if name == "orbax" else ["-m", f"solar_jax.{module}"]
    command = [sys.executable, *python, f"--source={source}", f"--out={out}", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def count_files(folder: pathlib.Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_kill_9_at_any_moment_then_the_same_command_completes_the_same_bytes(tmp_path, large, name):
    whole, out = tmp_path / "whole", tmp_path / "killed" / "out"
    process = start(name, large, whole)
    assert process.wait() == 0, process.stderr.read()
    assert count_files(whole) > 40
    rng, kills, kept = random.Random(name), 0, {}
    for part in (0, 0.1, 0.35, 0.6, 0.85):
        process = start(name, large, out)
        while process.poll() is None and not (
            partial(out).exists() and count_files(partial(out)) >= part * count_files(whole)
        ):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        if process.wait() == 0:  # it was faster
            shutil.rmtree(out)
            continue
        kills += 1
        assert names(out.parent) == [".out.partial"]
        with pytest.raises(UserError, match="no such checkpoint"):
            open_checkpoint(str(out))
        kept = {f.name: f.stat().st_mtime_ns for f in partial(out).glob("*.safetensors")}
    assert kills >= 3
    process = start(name, large, out)
    assert process.wait() == 0, process.stderr.read()
    assert names(out.parent) == ["out"]
    assert content(out) == content(whole)
    assert {file: (out / file).stat().st_mtime_ns for file in kept} == kept
