"""Alignment tuning of SOLAR 10.7B (arXiv 2312.15166, section 3.2): direct preference optimisation, in one pass.

    python -m solar_jax.train --config configs/dpo.py --config.source=RUN_OR_FOLDER --workdir DIR
    python -m solar_jax.train --config configs/dpo.py:smollm2 --workdir DIR

The log-probabilities of the reference, the model before tuning, are computed once and kept in DIR/reference, so that
no second model is in memory. `--config.preferences.losses=...` takes the other losses, docs/tuning.md lists them.

Full size
  trains    the result of configs/sft.py on UltraFeedback (cleaned) and Orca DPO pairs, both sides of a pair in one row
  needs     the memory of supervised fine-tuning; with --config.lora.rank=16 a v5e-8
  from the paper and its follow-up: data sets, beta 0.1, learning rate 5e-7 with warm-up and cosine, 1 epoch, 1,024
            tokens a side (rows of 2,048)
  chosen    batch
  licences  UltraFeedback MIT, Orca DPO pairs Apache-2.0

:smollm2, the same file at the size of a laptop
  trains    SmolLM2-135M-Instruct to prefer the right function's documentation to its neighbour's, 273 pairs
  needs     5 GiB of memory, about 4 minutes on 2 cores
  expect    held-out loss 0.693 (ln 2) before and 0.658 after, preference accuracy 68 +- 8 % on 38 held-out pairs
"""

import ml_collections

from solar_jax.config import defaults
from solar_jax.errors import UserError


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    if size not in ("full", "smollm2"):
        raise UserError(f"configs/dpo.py has the sizes full and smollm2, found {size!r}.")
    config = defaults()
    config.growth.operator = "identity"
    config.data.format = "pairs"
    config.preferences.losses = ("sigmoid",)
    config.preferences.beta = 0.1
    config.train.epochs = 1.0
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1
    config.optimizer.weight_decay = 0.0
    config.optimizer.final_fraction = 0.0

    if size == "full":
        config.name = "dpo"
        config.source = "runs/sft"
        config.fallback = "configs/dpo.py:smollm2"
        config.model.vocab_size = 32000
        config.model.hidden_size = 4096
        config.model.intermediate_size = 14336
        config.model.num_hidden_layers = 48
        config.model.num_attention_heads = 32
        config.model.num_key_value_heads = 8
        config.model.head_dim = 128
        config.model.rope_theta = 10000.0
        config.model.rms_norm_eps = 1e-5
        config.data.sources = (
            "hf://datasets/Intel/orca_dpo_pairs",
            "hf://datasets/allenai/ultrafeedback_binarized_cleaned/data/train_prefs*.parquet",
        )
        config.data.template = "solar"
        config.data.sequence_length = 2048
        config.data.holdout_every = 100
        config.train.batch_size = 64  # chosen: about 140 pairs a step
        config.train.accumulation = 0
        config.train.precision = "mixed"
        config.optimizer.learning_rate = 5e-7
        config.evaluation.every = 100
        config.evaluation.windows = 256
        config.evaluation.batch_size = 64
        config.checkpoint.every = 100
        config.export.dtype = "bfloat16"
        return config

    config.name = "dpo_smollm2"
    config.source = "smollm2"
    config.data.sources = ("pydoc-functions?limit=30000",)
    config.data.sequence_length = 512
    config.data.holdout_every = 8
    config.train.batch_size = 2
    config.train.remat = "matmuls"
    config.train.precision = "float32"
    config.optimizer.learning_rate = 5e-6  # a small model, few pairs
    config.evaluation.windows = 32
    config.evaluation.batch_size = 8
    config.checkpoint.every = 20
    config.checkpoint.keep = 1
    config.export.dtype = "float32"
    return config
