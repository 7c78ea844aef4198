"""Runs, prepared folders and checkpoints that an older version wrote (its commit is 84cec81) are read by this one.

old_runs.tar.xz holds two runs of four steps that were stopped after the second, one that trains everything and one that
trains the new layers, with the metrics of the two that were not stopped; a prepared folder of the same text; and the
grown model as an Orbax checkpoint and as an HF folder.
"""

import json
import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.config import DataConfig
from solar_jax.data.corpus import load_corpus

REPO = pathlib.Path(__file__).parents[1]


@pytest.fixture
def old(tmp_path, monkeypatch) -> pathlib.Path:
    with tarfile.open(REPO / "tests" / "old_runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def lines(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("trainable", ["all", "new"])
def test_a_run_that_an_older_version_began_is_completed_with_its_losses(old, trainable):
    config = json.loads((old / trainable / "config.json").read_text())
    assert (config["train"]["trainable"], config["train"]["steps"]) == (trainable, 4)
    keys = {
        "source": "model", "growth.m": 1, "data.sources": "corpus.txt", "data.sequence_length": 32, "train.steps": 4,
        "train.control": False, "train.trainable": trainable, "optimizer.warmup_steps": 1, "evaluation.windows": 2,
        "evaluation.every": 2, "checkpoint.every": 2, "checkpoint.keep": 3, "logging.compilation_cache": False,
    }  # fmt: skip
    # As many devices as the run had: on another mesh sums are in another order.
    ran = subprocess.run(
        [
            sys.executable, "-m", "solar_jax.train", "--config=config.py:smollm2", f"--workdir={trainable}",
            *(f"--config.{key}={value}" for key, value in keys.items()),
        ],
        cwd=old, env=os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(REPO)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "checkpoint of step 2" in ran.stdout
    found, expected = lines(old / trainable / "metrics.jsonl"), lines(old / f"{trainable}_metrics.jsonl")
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm"):  # another processor may round otherwise
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-6)
    assert lines(old / trainable / "evals.jsonl")[-1]["loss"] == pytest.approx(
        lines(old / f"{trainable}_evals.jsonl")[-1]["loss"], rel=1e-6
    )
    assert (old / trainable / "hf" / "model.safetensors").exists()


def test_a_prepared_folder_of_an_older_version_has_the_rows_of_its_text(old):
    checkpoint = open_checkpoint("model")
    tokenizer, eos = load_tokenizer(checkpoint), eos_id(checkpoint)

    def corpus(source: str):
        return load_corpus(DataConfig(sources=(source,), sequence_length=32), tokenizer, eos)

    before, now = corpus("prepared"), corpus("corpus.txt")
    for found, expected in ((before.train, now.train), (before.heldout, now.heldout)):
        ((_, found),), ((_, expected),) = found, expected
        assert len(found) == len(expected) > 0
        for i in range(len(found)):
            for name, value in expected[i].items():
                np.testing.assert_array_equal(found[i][name], value)


def test_an_orbax_checkpoint_of_an_older_version_is_bit_by_bit_the_hf_folder_it_was_written_with(old):
    import jax

    found, expected = load_params(open_checkpoint("orbax")), load_params(open_checkpoint("hf"))
    assert found["layers"]["q_proj"].shape[0] == 6
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
