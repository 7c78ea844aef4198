"""TinyLlama 1.1B grown from 22 to 34 layers by SOLAR's cut, on one small host or on a pod.

    python -m solar_jax.train --config configs/tinyllama.py:v5e_8 --workdir DIR
    python -m solar_jax.train --config configs/tinyllama.py:v5p_128 --workdir DIR

v5e_8 (the default)
  trains    1 B tokens, 64 rows of 2,048 a step, AdamW with float32 state
  needs     14.5 GiB of a chip's 15.8 GiB; predicted 2.9 hours and 27 dollars

v5p_128
  trains    10 B tokens, 512 rows of 2,048 a step
  needs     28.3 GiB of a chip's 95.7 GiB; predicted 1.3 hours and 350 dollars

Predictions are the planner's: python -m solar_jax.plan --config configs/tinyllama.py:v5e_8 --slice v5e-8
Which layers to repeat can be searched first: --config.growth.operator=search --config.growth.add=12
"""

import ml_collections

from solar_jax.config import defaults
from solar_jax.errors import UserError

SIZES = ("v5e_8", "v5p_128")


def get_config(size: str = "v5e_8") -> ml_collections.ConfigDict:
    if size not in SIZES:
        raise UserError(f"configs/tinyllama.py has the sizes {' and '.join(SIZES)}, found {size!r}.")
    config = defaults()
    config.name = f"tinyllama_{size}"
    config.source = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    config.fallback = "configs/dus_48l.py:smollm2"
    config.model.vocab_size = 32000
    config.model.hidden_size = 2048
    config.model.intermediate_size = 5632
    config.model.num_hidden_layers = 22
    config.model.num_attention_heads = 32
    config.model.num_key_value_heads = 4
    config.model.head_dim = 64
    config.model.rope_theta = 10000.0
    config.model.rms_norm_eps = 1e-5
    config.growth.operator = "dus"
    config.growth.m = 5
    config.data.sources = ("hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet",)
    config.data.sequence_length = 2048
    config.data.holdout_every = 1000
    config.train.accumulation = 0
    config.optimizer.learning_rate, config.optimizer.b2 = 4e-5, 0.95
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 200
    config.evaluation.windows = 128
    config.evaluation.batch_size = 64
    config.export.dtype = "bfloat16"
    if size == "v5e_8":
        config.train.steps, config.train.batch_size = 7_600, 64
        config.evaluation.every, config.checkpoint.every = 760, 380
        return config
    config.train.steps, config.train.batch_size = 9_500, 512
    config.evaluation.every, config.checkpoint.every = 950, 475
    return config
