"""A study of seconds: a tiny model, short documents, few steps."""

import json
import pathlib

import ml_collections
import numpy as np

from solar_jax.config import defaults
from solar_jax.studying.config import StudyConfig, resolve_study, study_defaults
from tests.conftest import hf_model, save_hf

WORDS = ["depth", "up", "scaling", "grows", "a", "model", "by", "its", "own", "layers", "and", "heals", "it"]
ARMS = (
    {"name": "base", "control": "tokens"},
    {"name": "base_flops", "control": "flops", "equal_to": ("dus",)},
    {"name": "dus", "operator": "dus", "m": 1},
    {"name": "block", "operator": "block_repeat", "a": 0, "b": 2},
    {"name": "pro", "operator": "llama_pro", "every": 2, "trainable": "new"},
)


def make_parts(folder: pathlib.Path) -> pathlib.Path:
    """A model of four layers in `model` and 120 documents in `docs.jsonl`."""
    save_hf(hf_model(num_hidden_layers=4), folder / "model")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(4, 16)))) for _ in range(120)]
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def content(parts: pathlib.Path, **changes) -> ml_collections.ConfigDict:
    """Content of a study's config file; `changes` are its own keys, and those of its run as run_train_steps."""
    run = defaults()
    run.name, run.source = "tiny", str(parts / "model")
    run.data.sources, run.data.sequence_length, run.data.holdout_every = (str(parts / "docs.jsonl"),), 32, 4
    run.train.steps, run.train.batch_size, run.train.remat, run.train.precision = 4, 4, "none", "float32"
    run.optimizer.schedule, run.optimizer.warmup_steps, run.evaluation.batch_size = "linear", 2, 8
    study = study_defaults()
    study.name, study.run, study.arms = "tiny", run, ARMS
    study.rates, study.seeds, study.probe_steps, study.bootstrap = (3e-3, 1e-3), (0, 1), 2, 200
    study.searched, study.rival = "block", "dus"
    with study.unlocked():
        for key, value in changes.items():
            if key.startswith("run_"):
                _, group, name = key.split("_", 2)
                study.run[group][name] = value
            else:
                study[key] = value
    return study


def made(parts: pathlib.Path, **changes) -> StudyConfig:
    return resolve_study(content(parts, **changes))
