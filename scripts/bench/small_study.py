"""A whole study at the size of a laptop: a small base trained here, grown in 17 ways or with experts, with controls.

    uv run --extra demo python scripts/bench/small_study.py --out DIR

The base is a Llama of 12 layers and 1.5 M parameters with a tokenizer of 2,048 entries, trained from scratch on the
sources of Python's standard library. The study is configs/study_smollm2.py:full with counts of layers scaled from 30 to
12, rows of 128 tokens, and two learning rates: 102,400 tokens an arm. `searched` is the best cut that a search finds on
this base beside dus(2) and block 1:9, which are arms anyway. The same command goes on from what is complete. DIR/study
holds the report. `--devices_per_arm=1` with JAX_NUM_CPU_DEVICES=2 runs two arms side by side.
"""

import argparse
import dataclasses
import pathlib
import re
import runpy
from typing import Any

from ml_collections import ConfigDict
from scratch_growth import BATCH, LENGTH, arm_config, make_donor

from solar_jax import train
from solar_jax.cli.config_files import find_config
from solar_jax.config import Config
from solar_jax.searching.find import SearchSettings
from solar_jax.searching.run import search_cuts
from solar_jax.study import run_study
from solar_jax.studying.config import resolve_study

LAYERS, ADDED, BASE_STEPS = 12, 8, 1500
# Numbers of SmolLM2's arms -> of this base's, and likewise in names
NUMBERS = {"m": {3: 1, 6: 2, 8: 3, 10: 4}, "a": {2: 1, 6: 2}, "b": {20: 9, 24: 10}, "every": {4: 2}}
NAMES = {
    "dus_3": "dus_1", "dus_6": "dus_2", "dus_8": "dus_3", "dus_10": "dus_4", "block_2_20": "block_1_9",
    "split_6_24": "split_2_10",
}  # fmt: skip


def base_config(donor: pathlib.Path) -> Config:
    """The run that makes the base."""
    config = arm_config(donor, LAYERS, BASE_STEPS, 0, {})
    narrow = dataclasses.replace(
        config.model, hidden_size=96, intermediate_size=288, num_attention_heads=3, num_key_value_heads=1
    )
    data = dataclasses.replace(config.data, holdout_every=5)
    return dataclasses.replace(config, name="small_base", model=narrow, data=data)


def renamed(name: str) -> str:
    return re.sub("|".join(map(re.escape, NAMES)), lambda found: NAMES[found[0]], name)


def scaled(arm: dict[str, Any], searched: str) -> dict[str, Any]:
    """An arm of SmolLM2's study on this base; `searched` holds the slices of the searched cut."""
    if arm["name"] == "searched":
        return {"name": "searched", "operator": "slices", "slices": searched}
    arm = arm | {key: to[arm[key]] for key, to in NUMBERS.items() if key in arm} | {"name": renamed(arm["name"])}
    return arm | {"equal_to": tuple(map(renamed, arm["equal_to"]))} if "equal_to" in arm else arm


def study_config(base: Config, folder: pathlib.Path, searched: str) -> ConfigDict:
    """SmolLM2's study for a base, its run and its Hugging Face folder."""
    config = runpy.run_path(find_config("study_smollm2"))["get_config"]("full")
    run = config.run
    config.name = run.name = "small_study"
    run.source, run.data.sources, run.data.sequence_length = str(folder), base.data.sources, LENGTH
    run.data.holdout_every = base.data.holdout_every  # the documents that the base has not seen either
    run.train.batch_size, run.train.remat, run.evaluation.batch_size = 8, "none", 64
    config.arms = tuple(scaled(arm, searched) for arm in config.arms)
    config.rates, config.rival = (1e-4, 3e-4), "dus_2"
    config.sunk_tokens = float(BASE_STEPS * BATCH * LENGTH)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--devices_per_arm", type=int, default=0)
    parser.add_argument("--dry_run", action="store_true", help="train the base, search, and print the study's plan")
    args = parser.parse_args()
    donor, hf = args.out / "tokenizer", args.out / "base" / "hf"
    if not donor.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        make_donor(donor)
    base = base_config(donor)
    trained = train.run(base, hf.parent)
    found = search_cuts(
        Config(source=str(hf), data=base.data), SearchSettings(ADDED), args.out / "search.json", other="", tokens=4096,
        windows=40, dtype="float32",
    )  # fmt: skip
    searched = next(cut for cut in found["candidates"] if cut["blocks"] not in ("2:10", "1:9"))
    print(f"base: held-out loss {trained['final_loss']:.4f}; the best cut: {found['best']['blocks']}")
    study = study_config(base, hf, searched["slices"])
    study.seeds, study.devices_per_arm = tuple(range(args.seeds)), args.devices_per_arm
    run_study(resolve_study(study), args.out / "study", dry_run=args.dry_run)


if __name__ == "__main__":
    main()
