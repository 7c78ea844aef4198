"""Growth operators compared: the same rows for every arm, beside the base at equal tokens and at equal FLOPs.

    python -m solar_jax.study --config configs/study_smollm2.py:quick --workdir DIR
    python -m solar_jax.study --config configs/study_smollm2.py:core --workdir DIR
    python -m solar_jax.study --config configs/study_smollm2.py:full --workdir DIR

:full
  trains    SmolLM2-135M-Instruct, 30 layers, grown in 17 ways or with experts in 4, and three controls, each at
            three learning rates, and with three seeds for controls and for what comes near the best; 100 steps of 1,024
            tokens an arm
  text      what every CPython carries: its documentation topics and the sources of its standard library
  needs     8 GiB of memory; `--dry_run` says the FLOPs, and the first arm's speed the hours: days on 2 cores, so give
            it a machine with accelerators, where config.devices_per_arm=1 runs arms side by side

:quick
  trains    four arms and three controls, two rates, one seed, 10 steps of 1,024 tokens
  needs     8 GiB of memory; 2.8e14 FLOPs, 20 minutes on 2 cores that nothing else uses

:core
  trains    the same four arms and the base at equal tokens and at equal FLOPs, 100 steps of 1,024 tokens, each at the
            rate that :quick chose for it, one seed; on all of the text
  needs     8 GiB of memory; 8.2e14 FLOPs, an hour on 2 cores that nothing else uses

:tiny
  trains    as :quick with two steps of 128 tokens, for tests of the command
"""

import ml_collections

from solar_jax.config import defaults
from solar_jax.errors import UserError
from solar_jax.studying.config import study_defaults

SIZES = ("full", "core", "quick", "tiny")
# The result of `python -m solar_jax.search --source smollm2 --add 18` (docs/searching.md).
SEARCHED = {"name": "searched", "operator": "blocks", "blocks": "2:12,12:20"}

CONTROLS = (
    {"name": "base_tokens", "control": "tokens"},
    # At the FLOPs of dus_6, which most arms share; with () there would be one for each number of FLOPs.
    {"name": "base_flops", "control": "flops", "equal_to": ("dus_6",)},
)
TIED = ({"name": "tied_dus_6", "control": "tied", "operator": "tied", "of": "dus", "m": 6},)
FEW = (
    {"name": "dus_6", "operator": "dus", "m": 6},
    SEARCHED,
    {"name": "gated_dus_0.25", "operator": "gated", "of": "dus", "m": 6, "beta": 0.25},
    {"name": "llama_pro_new", "operator": "llama_pro", "every": 4, "trainable": "new"},
)
"""Arms of :quick."""
CHOSEN = {"base_tokens": 1e-4, "base_flops": 1e-4, "gated_dus_0.25": 1e-4}
"""Rates that :quick chose, of 1e-4 and 3e-4, where it was not 3e-4."""
MANY = (
    *({"name": f"dus_{m}", "operator": "dus", "m": m} for m in (3, 6, 8, 10)),
    {"name": "naive", "operator": "naive", "copies": 2},
    {"name": "interleave", "operator": "interleave", "copies": 2},
    {"name": "block_2_20", "operator": "block_repeat", "a": 2, "b": 20},
    SEARCHED,
    *(
        {"name": f"gated_{name}_{beta:g}", "operator": "gated", "of": of, "beta": beta, **numbers}
        for name, of, numbers in (("dus_6", "dus", {"m": 6}), ("block_2_20", "block_repeat", {"a": 2, "b": 20}))
        for beta in (0.25, 0.5)
    ),
    {"name": "split_6_24", "operator": "split", "a": 6, "b": 24, "alpha": 0.5},
    {"name": "llama_pro_new", "operator": "llama_pro", "every": 4, "trainable": "new"},
    *(
        {"name": f"zeroed_{inner}", "operator": "zeroed", "m": 6, "inner": inner}
        for inner in ("copy", "mean", "normal")
    ),
    # The paper's way not taken: of the parameters nearest dus(6)'s (214 M and 198 M), and of its FLOPs.
    *(
        {"name": f"moe_{experts}_top_{k}_r{redrawn:g}", "experts": experts, "top_k": k, "redrawn": redrawn}
        for experts, k in ((2, 1), (4, 2))
        for redrawn in (0.0, 0.5)
    ),
)
"""Arms of :full."""


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    if size not in SIZES:
        raise UserError(f"configs/study_smollm2.py has the sizes {', '.join(SIZES)}, found {size!r}.")
    run = defaults()
    run.name = f"study_smollm2_{size}"
    run.source = "smollm2"
    run.data.sources = ("pydoc-topics",)
    run.data.sequence_length = 256
    run.data.holdout_every = 8
    run.train.steps = 10
    run.train.batch_size = 4
    run.train.remat = "matmuls"
    run.train.precision = "float32"
    run.optimizer.schedule = "linear"
    run.optimizer.warmup_fraction = 0.1
    run.optimizer.b1, run.optimizer.b2 = 0.9, 0.95
    run.evaluation.batch_size = 8

    config = study_defaults()
    config.name = run.name
    config.run = run
    config.sunk_tokens = 2e12  # SmolLM2-135M's pretraining, as its authors state (arXiv 2502.02737)
    config.document_tokens = 256
    config.searched, config.rival = "searched", "dus_6"
    if size == "full":
        run.data.sources = ("pydoc-topics", "python-stdlib")
        run.train.steps = 100
        config.arms = (*CONTROLS, *TIED, *MANY)
        config.rates = (3e-5, 1e-4, 3e-4)
        config.seeds = (0, 1, 2)
        config.probe_steps = 50
        config.evaluate_every = 25
        config.validation_documents, config.test_documents = 24, 48
        return config
    if size == "core":
        run.data.sources = ("pydoc-topics", "python-stdlib")
        run.train.steps = 100
        config.arms = tuple(arm | {"rates": (CHOSEN.get(str(arm["name"]), 3e-4),)} for arm in (*CONTROLS, *FEW))
        config.rates = (3e-4,)
        config.seeds = (0,)
        config.probe_steps = 50
        config.evaluate_every = 25
        config.validation_documents, config.test_documents = 24, 48
        return config
    run.data.sources = ("pydoc-topics", "python-stdlib?limit=300000")
    config.arms = (*CONTROLS, *TIED, *FEW)
    config.rates = (1e-4, 3e-4)
    config.seeds = (0,)
    config.probe_steps = 5
    config.evaluate_every = 5
    config.validation_documents, config.test_documents = 8, 24
    if size == "tiny":
        run.data.sequence_length = 128
        run.train.steps, run.train.batch_size = 2, 1
        config.rates = (1e-4,)
        config.probe_steps = 1
        config.validation_documents, config.test_documents = 2, 2
        config.document_tokens = 32
    return config
