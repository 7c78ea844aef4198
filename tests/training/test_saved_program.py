"""A compiled step goes through the disk to another process; one that does not fit is refused by what differs."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from solar_jax.config import Config, resolve
from solar_jax.errors import UserError
from solar_jax.parallel.mesh import make_mesh
from solar_jax.planning.aot import lower_step
from solar_jax.training.saved_program import PROGRAM, RECORD, SavedProgram, open_program, save_program
from tests.conftest import save_model_and_text
from tests.test_config import dus_48l

REPO = pathlib.Path(__file__).parents[2]


def run(module: str, place: pathlib.Path, *more: str, status: int = 0, **keys) -> str:
    """Runs a command and returns what it says, in a process of its own with four devices."""
    flags = {
        "source": place / "model", "growth.m": 1, "data.sources": place / "corpus.txt", "data.sequence_length": 32,
        "train.steps": 3, "train.batch_size": 4, "train.control": False, "train.precision": "float32",
        "optimizer.warmup_steps": 1, "evaluation.windows": 4, "mesh.fsdp": 2, "mesh.tensor": 2,
    } | {key.replace("_", ".", 1): value for key, value in keys.items()}  # fmt: skip
    command = [sys.executable, "-m", f"solar_jax.{module}", f"--config={REPO}/configs/dus_48l.py:smollm2", *more]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    done = subprocess.run(
        command, cwd=place, env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"}, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    return said


@pytest.mark.slow  # five processes
def test_a_step_that_one_process_compiled_trains_in_another_with_the_same_bits(tmp_path):
    place, program = save_model_and_text(tmp_path, 3000), tmp_path / "program"
    assert f"run with --config.train.compiled={program}" in run("plan", place, f"--save={program}")
    said = run("train", place, "--workdir=loaded", train_compiled=program)
    assert f"compiled step loaded from {program}" in said
    run("train", place, "--workdir=compiled")
    losses = [[json.loads(line)["loss"] for line in (place / of / "metrics.jsonl").read_text().splitlines()]
              for of in ("loaded", "compiled")]  # fmt: skip
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    # What differs is named before anything is written: a key of the config, and the devices.
    said = run("train", place, "--workdir=other", status=2, train_compiled=program, optimizer_learning_rate=1e-3)
    assert "was compiled for config.optimizer.learning_rate=0.0001, found 0.001" in said
    said = run("train", place, "--workdir=other", status=2, train_compiled=program, mesh_fsdp=4, mesh_tensor=1)
    assert "was compiled for mesh: fsdp=2, found 4" in said
    assert not (place / "other").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[pathlib.Path, Config, jax.sharding.Mesh, jax.stages.Lowered]:
    """A saved step of a tiny model on one device, and what it was made from."""
    content = dus_48l()
    content.model.update(
        {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    )  # fmt: skip
    content.train.batch_size, content.data.sequence_length = 2, 16
    content.train.remat, content.train.accumulation = "full", 1
    config, folder = resolve(content), tmp_path_factory.mktemp("saved") / "program"
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    lowered = lower_step(config.model.architecture, config, mesh)
    save_program(folder, config.model.architecture, config, mesh, lowered, lowered.compile())
    return folder, config, mesh, lowered


def test_what_a_run_leaves_open_is_taken_from_the_step_and_what_it_sets_is_not(saved):
    folder, config, _, _ = saved
    program = open_program(str(folder))
    assert program is not None
    train = dataclasses.replace(config.train, remat="auto", accumulation=0)
    filled = program.filled(dataclasses.replace(config, train=train))
    assert (filled.train.remat, filled.train.accumulation, filled.mesh.fsdp) == ("full", 1, 1)
    train = dataclasses.replace(config.train, remat="none", accumulation=2)
    filled = program.filled(dataclasses.replace(config, train=train, mesh=dataclasses.replace(config.mesh, fsdp=8)))
    assert (filled.train.remat, filled.train.accumulation, filled.mesh.fsdp) == ("none", 2, 8)


def changed(program: SavedProgram, **groups: dict) -> SavedProgram:
    record = {group: values | groups.get(group, {}) for group, values in program.record.items()}
    return SavedProgram(program.folder, record)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"versions": {"jaxlib": "0.1"}}, "versions: jaxlib=0.1, found "),
        ({"devices": {"kind": "TPU v5p"}}, "devices: kind=TPU v5p, found cpu"),
        ({"devices": {"count": 64}}, "devices: count=64, found 1"),
        ({"mesh": {"order": [3]}}, r"mesh: order=\[3\], found \[0\]"),
        ({"mesh": {"tensor": 4}}, "mesh: tensor=4, found none"),
        ({"model": {"hidden_size": 4096}}, "model: hidden_size=4096, found 16"),
        ({"config": {"train.batch_size": 8}}, "config.train.batch_size=8, found 2"),
    ],
)
def test_a_step_of_other_versions_devices_or_sizes_is_refused_by_name(saved, groups, said):
    folder, config, mesh, _ = saved
    program = open_program(str(folder))
    assert program is not None
    program.check(config.model.architecture, config, mesh)
    with pytest.raises(UserError, match=f"config.train.compiled={folder}: the step was compiled for {said}"):
        changed(program, **groups).check(config.model.architecture, config, mesh)


def test_a_step_for_a_tpu_is_refused_before_the_run_takes_its_mesh(saved):
    program = open_program(str(saved[0]))
    assert program is not None
    with pytest.raises(UserError, match="devices: kind=TPU v5p, found cpu; compile it again"):
        changed(program, devices={"kind": "TPU v5p", "count": 64}).check_machine()


def test_another_program_and_a_damaged_file_are_refused(saved, tmp_path):
    folder, _, mesh, lowered = saved
    program = open_program(str(folder))
    assert program is not None
    assert program.load(lowered, mesh) is not None
    with pytest.raises(UserError, match="was compiled from another program"):
        changed(program, sums={"hlo": "0"}).load(lowered, mesh)
    (tmp_path / PROGRAM).write_bytes((folder / PROGRAM).read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{PROGRAM}: its SHA-256 is not that in {RECORD}"):
        SavedProgram(tmp_path, program.record).load(lowered, mesh)


def test_a_folder_without_a_step_is_refused(tmp_path):
    assert open_program("") is None
    with pytest.raises(UserError, match=f"holds no compiled step .no {RECORD}."):
        open_program(str(tmp_path))
    (tmp_path / RECORD).write_text('{"versions": {}}')
    with pytest.raises(UserError, match="expected the groups versions, devices, mesh, model, config, sums, found ver"):
        open_program(str(tmp_path))
