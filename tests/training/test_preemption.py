"""Runs that are asked to stop, or stopped, and go on elsewhere: the same batches and losses."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from scripts.bench import kill_training
from solar_jax.orbax_store.layout import newest
from tests.conftest import free_port, save_model_and_text

REPO = pathlib.Path(__file__).parents[2]
INTERRUPTED = 75
GRACE = 25.0  # seconds between a machine's notice and its end, at the least
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    return save_model_and_text(tmp_path_factory.mktemp("source"), words=4000)


def start(
    source: pathlib.Path, workdir: pathlib.Path, processes: int = 1, devices: int = 1, **changes
) -> list[subprocess.Popen]:
    """A run of 40 steps in so many processes of so many CPU devices; `changes`: keys with _ for their first dot."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    if processes > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    flags = {
        "source": source / "model", "growth.m": 1, "data.sources": source / "corpus.txt", "data.sequence_length": 32,
        "train.steps": 40, "train.batch_size": 4, "train.control": False, "train.precision": "float32",
        "optimizer.warmup_steps": 1, "evaluation.every": 4, "evaluation.windows": 4, "checkpoint.every": 100,
    } | {key.replace("_", ".", 1): value for key, value in changes.items()}  # fmt: skip
    command = [sys.executable, "-u", "-m", "solar_jax.train", f"--config={REPO}/configs/dus_48l.py:smollm2"]
    command += [f"--workdir={workdir}", "--allow_changed=mesh"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    return [
        subprocess.Popen(
            command, cwd=REPO, env=env | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]  # fmt: skip


def ended(running: list[subprocess.Popen], status: int = 0) -> list[str]:
    said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [status] * len(running), "\n".join(said)
    return said


def interrupt(
    running: list[subprocess.Popen], step: int, number: signal.Signals = signal.SIGTERM
) -> tuple[list[str], float]:
    """A signal to the last process after the first has told of a step; what they said and how long they took to end."""
    assert running[0].stdout is not None
    for line in running[0].stdout:
        if line.startswith(f"healed step {step:>2}/"):
            break
    begin = time.monotonic()
    running[-1].send_signal(number)
    said = ended(running, INTERRUPTED)
    return said, time.monotonic() - begin


def losses(workdir: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    ended(start(source, workdir))
    return workdir


def test_sigterm_saves_the_step_within_the_grace_and_ends_with_a_status_of_its_own(source, whole, tmp_path):
    processes = 2  # the next test but one interrupts a single one
    said, seconds = interrupt(start(source, tmp_path / "run", processes), 3)
    assert seconds < GRACE
    saved = newest(tmp_path / "run")
    assert saved is not None
    assert int(saved.name) >= 3
    for text in said:
        assert f"asked to stop; step {saved.name} is saved" in text
    assert len(losses(tmp_path / "run")) == int(saved.name)
    (text, *_) = ended(start(source, tmp_path / "run", processes))
    assert f"resuming from the checkpoint of step {saved.name}" in text
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole), rtol=1e-5)


def test_sigterm_before_the_steps_ends_at_once(source, tmp_path):
    (process,) = start(source, tmp_path / "run")
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("Starting"))
    process.send_signal(signal.SIGTERM)
    (said,) = ended([process], INTERRUPTED)
    assert "stopped by SIGTERM" in said
    assert "Traceback" not in said


def test_a_run_goes_on_on_another_mesh_and_on_more_processes(source, whole, tmp_path):
    workdir = tmp_path / "run"
    (said,), _ = interrupt(start(source, workdir, devices=4, mesh_fsdp=4, mesh_tensor=1), 2, signal.SIGINT)
    assert "stopping after this step, which is saved; Ctrl-C again quits at once" in said
    for processes, devices, fsdp, tensor in ((1, 4, 2, 2), (1, 1, 1, 1), (2, 1, 2, 1), (4, 1, 4, 1)):
        found = newest(workdir)
        assert found is not None
        running = start(source, workdir, processes, devices, mesh_fsdp=fsdp, mesh_tensor=tensor)
        if processes < 4:
            interrupt(running, int(found.name) + 1)
        else:
            ended(running)
    np.testing.assert_allclose(losses(workdir), losses(whole), rtol=1e-5)


def test_killed_at_random_moments_every_start_goes_on_bit_by_bit(tmp_path):
    counts = kill_training.run(tmp_path / "work", kills=4, seed=1)
    assert sum(counts[moment] for moment in kill_training.MOMENTS) == 4
    assert counts["finished"] >= 1
