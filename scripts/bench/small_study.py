"""A whole study at the size of a laptop: a small base trained here, grown in 17 ways or with experts, with controls.

    uv run --extra demo python scripts/bench/small_study.py --out DIR

The base is a Llama of 12 layers and 1.5 M parameters with a tokenizer of 2,048 entries, trained from scratch on the
sources of Python's standard library. The arms are those of configs/study_smollm2.py:full with counts of layers scaled
from 30 to 12: two learning rates, 102,400 tokens an arm. `searched` is the best cut that a search finds on this base
beside dus(2) and block 1:9, which are arms anyway. The same command goes on from what is complete. DIR/study holds the
report. `--devices_per_arm=1` with JAX_NUM_CPU_DEVICES=2 runs two arms side by side.
"""

import argparse
import dataclasses
import pathlib

from ml_collections import ConfigDict
from scratch_growth import arm_config, make_donor

from solar_jax import train
from solar_jax.config import Config, defaults
from solar_jax.searching.find import SearchSettings
from solar_jax.searching.run import search_cuts
from solar_jax.study import run_study
from solar_jax.studying.config import resolve_study, study_defaults

LAYERS, ADDED, BASE_STEPS = 12, 8, 1500
BATCH, LENGTH = 8, 128  # of an arm
RATES = (1e-4, 3e-4)


def base_config(donor: pathlib.Path) -> Config:
    """The run that makes the base."""
    config = arm_config(donor, LAYERS, BASE_STEPS, 0, {})
    narrow = dataclasses.replace(
        config.model, hidden_size=96, intermediate_size=288, num_attention_heads=3, num_key_value_heads=1
    )
    data = dataclasses.replace(config.data, holdout_every=5)
    return dataclasses.replace(config, name="small_base", model=narrow, data=data)


def arms(searched: str) -> tuple[dict[str, object], ...]:
    """Controls and arms; `searched` holds the slices of the searched cut."""
    dus, block = {"operator": "dus", "m": 2}, {"operator": "block_repeat", "a": 1, "b": 9}
    return (
        {"name": "base_tokens", "control": "tokens"},
        {"name": "base_flops", "control": "flops", "equal_to": ("dus_2",)},
        {"name": "tied_dus_2", "control": "tied", "operator": "tied", "of": "dus", "m": 2},
        *({"name": f"dus_{m}", "operator": "dus", "m": m} for m in (1, 2, 3, 4)),
        {"name": "naive", "operator": "naive", "copies": 2},
        {"name": "interleave", "operator": "interleave", "copies": 2},
        {"name": "block_1_9"} | block,
        {"name": "searched", "operator": "slices", "slices": searched},
        *(
            {"name": f"gated_{name}_{beta:g}"} | of | {"operator": "gated", "of": of["operator"], "beta": beta}
            for name, of in (("dus_2", dus), ("block_1_9", block))
            for beta in (0.25, 0.5)
        ),
        {"name": "split_2_10", "operator": "split", "a": 2, "b": 10, "alpha": 0.5},
        {"name": "llama_pro_new", "operator": "llama_pro", "every": 2, "trainable": "new"},
        *(
            {"name": f"zeroed_{inner}", "operator": "zeroed", "m": 2, "inner": inner}
            for inner in ("copy", "mean", "normal")
        ),
        # Of the parameters nearest dus(2)'s, and of its FLOPs.
        *(
            {"name": f"moe_{experts}_top_{k}_r{redrawn:g}", "experts": experts, "top_k": k, "redrawn": redrawn}
            for experts, k in ((2, 1), (4, 2))
            for redrawn in (0.0, 0.5)
        ),
    )


def study_config(base: pathlib.Path, searched: str, seeds: int) -> ConfigDict:
    """The study of a base."""
    run = defaults()
    run.name, run.source = "small_study", str(base)
    run.data.sources, run.data.sequence_length = ("python-stdlib?limit=3000000",), LENGTH
    run.data.holdout_every = 5  # the documents that the base has not seen either
    run.train.steps, run.train.batch_size = 100, BATCH
    run.train.precision, run.train.remat = "float32", "none"
    run.optimizer.schedule, run.optimizer.warmup_fraction = "linear", 0.1
    run.optimizer.b1, run.optimizer.b2 = 0.9, 0.95
    run.evaluation.batch_size = 64
    config = study_defaults()
    config.name, config.run, config.arms = run.name, run, arms(searched)
    config.rates, config.seeds = RATES, tuple(range(seeds))
    config.probe_steps, config.evaluate_every = 50, 25
    config.validation_documents, config.test_documents, config.document_tokens = 24, 48, 256
    config.sunk_tokens = float(BASE_STEPS * 16 * LENGTH)
    config.searched, config.rival = "searched", "dus_2"
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--devices_per_arm", type=int, default=0)
    parser.add_argument("--dry_run", action="store_true", help="train the base, search, and print the study's plan")
    args = parser.parse_args()
    donor, base = args.out / "tokenizer", args.out / "base"
    if not donor.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        make_donor(donor)
    trained = train.run(base_config(donor), base)
    study = study_config(base / "hf", "", args.seeds)
    searched = Config(source=str(base / "hf"), data=base_config(donor).data)
    found = search_cuts(
        searched, SearchSettings(ADDED), args.out / "search.json", other="", tokens=4096, windows=40, dtype="float32"
    )
    searched_cut = next(c for c in found["candidates"] if c["blocks"] not in ("2:10", "1:9"))
    print(f"base: held-out loss {trained['final_loss']:.4f}; the best cut: {found['best']['blocks']}")
    study.arms, study.devices_per_arm = arms(searched_cut["slices"]), args.devices_per_arm
    run_study(resolve_study(study), args.out / "study", dry_run=args.dry_run)


if __name__ == "__main__":
    main()
