"""Stepwise DPO (arXiv 2403.19270), by which Upstage aligned SOLAR's successors: chunks of pairs, one after the other.

    python -m solar_jax.train --config configs/sdpo.py --config.source=RUN_OR_FOLDER --workdir DIR
    python -m solar_jax.train --config configs/sdpo.py:smollm2 --workdir DIR

The start and the reference of a chunk are the result of the chunk before it. One command, one folder, resumed in any
chunk: DIR/chunk1 is the first result, a model like any other, DIR the last. All else is as in configs/dpo.py.

Full size
  trains    the result of configs/sft.py, one chunk a source: first Orca DPO pairs, then UltraFeedback (cleaned)
  from the paper: data sets and their order, one chunk a source, 1 epoch a chunk, learning rate, length

:smollm2, the same file at the size of a laptop
  trains    SmolLM2-135M-Instruct on the pairs of configs/dpo.py, easiest first in two chunks
  needs     5 GiB of memory, about 4 minutes on 2 cores
  expect    from the result of configs/sft.py:smollm2, held-out loss 0.693 before, 0.626 and 0.615 after the two chunks,
            preference accuracy 76 +- 7 % on 38 held-out pairs
"""

import ml_collections

from solar_jax.config import defaults
from solar_jax.errors import UserError


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    if size not in ("full", "smollm2"):
        raise UserError(f"configs/sdpo.py has the sizes full and smollm2, found {size!r}.")
    config = defaults()
    config.growth.operator = "identity"
    config.data.format = "pairs"
    config.preferences.losses = ("sigmoid",)
    config.preferences.beta = 0.1
    config.preferences.chunks = "source"
    config.train.epochs = 1.0  # a chunk
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1
    config.optimizer.weight_decay = 0.0
    config.optimizer.final_fraction = 0.0

    if size == "full":
        config.name = "sdpo"
        config.source = "runs/sft"
        config.fallback = "configs/sdpo.py:smollm2"
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
        config.train.batch_size = 64  # chosen
        config.train.accumulation = 0
        config.train.precision = "mixed"
        config.optimizer.learning_rate = 5e-7
        config.evaluation.every = 100
        config.evaluation.windows = 256
        config.evaluation.batch_size = 64
        config.checkpoint.every = 100
        config.export.dtype = "bfloat16"
        return config

    config.name = "sdpo_smollm2"
    config.source = "smollm2"
    config.data.sources = ("pydoc-functions?limit=30000",)
    config.data.sequence_length = 512
    config.data.holdout_every = 8
    config.preferences.chunks = "difficulty:2"
    config.train.batch_size = 2
    config.train.remat = "matmuls"
    config.train.precision = "float32"
    config.optimizer.learning_rate = 5e-6
    config.evaluation.windows = 32
    config.evaluation.batch_size = 8
    config.checkpoint.every = 20
    config.checkpoint.keep = 1
    config.export.dtype = "float32"
    return config
