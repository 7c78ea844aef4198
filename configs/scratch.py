"""A model from scratch that grows while it trains: a small model, data, training, growth, and training on.

    python -m solar_jax.train --config configs/scratch.py --workdir DIR
    python -m solar_jax.train --config configs/scratch.py:stdlib --workdir DIR

The model grows by `growth.operator` after `growth.at_step` steps and again at each step of `growth.schedule`: G_stack
(naive), MIDAS, LIDAS or gradual stacking (stack_last). configs/scratch_chain.py tunes the result as well.

:full (the default)
  trains    a Llama as wide as TinyLlama, 11 -> 17 -> 23 layers by LIDAS, on FineWeb-Edu's sample of 10 B tokens
  needs     16 bytes a parameter of state over all chips: a TPU v5e-16 or more; `plan` chooses mesh and microbatches
  chosen    everything: no paper gives this recipe

:stdlib, the same file at the size of a laptop
  trains    4 -> 6 -> 8 layers by LIDAS, 7.9 M parameters, of which 6.3 M are the embedding of SmolLM2's tokenizer, on
            the sources of Python's standard library
  needs     2 GiB of memory, some minutes on 2 cores
"""

import ml_collections

from solar_jax.config import defaults
from solar_jax.errors import UserError


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    if size not in ("full", "stdlib"):
        raise UserError(f"configs/scratch.py has the sizes full and stdlib, found {size!r}.")
    config = defaults()
    config.source = "scratch"
    config.optimizer.schedule = "wsd"
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.95

    if size == "full":
        config.name = "scratch"
        config.fallback = "configs/scratch.py:stdlib"
        config.model.hidden_size = 2048
        config.model.intermediate_size = 5632
        config.model.num_hidden_layers = 11
        config.model.num_attention_heads = 32
        config.model.num_key_value_heads = 4
        config.model.head_dim = 64
        config.model.vocab_size = 49152
        config.model.tie_word_embeddings = False
        config.growth.operator = "lidas"
        config.growth.b = 6
        config.growth.at_step = 4_000
        config.growth.schedule = (8_000,)  # 11 -> 17 -> 23 layers
        config.growth.rewarm_steps = 100
        config.data.sources = ("hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet",)
        config.data.sequence_length = 2048
        config.data.holdout_every = 1000
        config.train.steps = 18_000  # 9.4 B tokens
        config.train.batch_size = 256
        config.train.accumulation = 0
        config.optimizer.learning_rate = 4e-4
        config.optimizer.warmup_steps = 500
        config.evaluation.every = 1_000
        config.evaluation.windows = 256
        config.evaluation.batch_size = 64
        config.checkpoint.every = 500
        return config

    config.name = "scratch_stdlib"
    config.model.hidden_size = 128
    config.model.intermediate_size = 384
    config.model.num_hidden_layers = 4
    config.model.num_attention_heads = 4
    config.model.num_key_value_heads = 2
    config.model.head_dim = 32
    config.model.tie_word_embeddings = True
    config.growth.operator = "lidas"
    config.growth.b = 2
    config.growth.at_step = 80
    config.growth.schedule = (140,)
    config.growth.rewarm_steps = 10
    config.data.sources = ("python-stdlib?limit=2000000",)
    config.data.sequence_length = 256
    config.data.holdout_every = 8
    config.train.steps = 200
    config.train.batch_size = 16
    config.train.precision = "float32"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.evaluation.every = 50
    config.evaluation.windows = 64
    config.evaluation.batch_size = 16
    config.checkpoint.every = 50
    config.checkpoint.keep = 1
    config.export.dtype = "float32"
    return config
