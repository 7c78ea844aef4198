"""Mistral 7B to 48 layers by SOLAR's cut, on one small host or on a pod; healed on as many tokens as each can afford.

    python -m solar_jax.train --config configs/mistral_7b.py:v5e_8 --workdir DIR
    python -m solar_jax.train --config configs/mistral_7b.py:v5p_128 --workdir DIR

v5e_8 (the default)
  trains    250 M tokens, 8 rows of 4,096 a step, weights and Lion's one moment in bfloat16: AdamW's two do not fit
  needs     14.6 GiB of a chip's 15.8 GiB; predicted 5.0 hours and 48 dollars

v5p_128
  trains    1 B tokens, 256 rows of 4,096 a step, AdamW with float32 state
  needs     77.7 GiB of a chip's 95.7 GiB; predicted 0.8 hours and 213 dollars

Predictions are the planner's: python -m solar_jax.plan --config configs/mistral_7b.py:v5e_8 --slice v5e-8
Which layers to repeat can be searched first: --config.growth.operator=search --config.growth.add=16
"""

import pathlib
import runpy

import ml_collections

from solar_jax.errors import UserError

SIZES = ("v5e_8", "v5p_128")


def get_config(size: str = "v5e_8") -> ml_collections.ConfigDict:
    if size not in SIZES:
        raise UserError(f"configs/mistral_7b.py has the sizes {' and '.join(SIZES)}, found {size!r}.")
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("dus_48l.py")))["get_config"]()
    config.name = f"mistral_7b_{size}"
    config.evaluation.windows, config.evaluation.batch_size = 64, 8
    if size == "v5e_8":
        config.train.steps, config.train.batch_size, config.train.accumulation = 7_600, 8, 1
        config.train.precision = "bf16"
        config.optimizer.name, config.optimizer.learning_rate = "lion", 3e-6
        config.optimizer.b1, config.optimizer.b2 = 0.9, 0.99
        config.optimizer.warmup_steps = 300
        config.evaluation.every, config.checkpoint.every = 760, 380
        return config
    config.train.steps = 950
    config.optimizer.warmup_steps = 100
    config.evaluation.every, config.checkpoint.every = 190, 95
    return config
