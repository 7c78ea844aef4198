"""Instruction tuning of SOLAR 10.7B (arXiv 2312.15166, section 3.1): supervised fine-tuning on answers.

    python -m solar_jax.train --config configs/sft.py --workdir DIR
    python -m solar_jax.train --config configs/sft.py:smollm2 --workdir DIR

Full size
  trains    SOLAR-10.7B on the answers of Alpaca-GPT4, OpenOrca and MetaMathQA, with SOLAR's own prompt format
  needs     as continued pretraining: on a TPU v5p-128 26 of a chip's 95 GiB; with --config.lora.rank=16 a v5e-8
  from the paper: the data sets (MetaMathQA stands in for its Synth. Math-Instruct, which is not public), the template
  chosen, since the paper does not disclose them: share of each, epochs, batch, row length, optimiser, learning rate
  licences  Alpaca-GPT4 CC BY-NC 4.0, OpenOrca MIT, MetaMathQA MIT: check that yours is a use that they allow
  leaks     the paper removes benchmark tasks from OpenOrca; `python -m solar_jax.prepare --config configs/sft.py
            --decontaminate FILES --out DIR` does it for the benchmarks that you name

:smollm2, the same file at the size of a laptop
  trains    SmolLM2-135M-Instruct on 766 questions about functions of Python's standard library
  needs     4 GiB of memory, about 4 minutes on 2 cores
  expect    held-out loss on answers 3.52 before and 2.32 after; the end token after an answer from 8 to 78 %
"""

import ml_collections

from solar_jax.config import defaults
from solar_jax.errors import UserError


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    if size not in ("full", "smollm2"):
        raise UserError(f"configs/sft.py has the sizes full and smollm2, found {size!r}.")
    config = defaults()
    config.growth.operator = "identity"
    config.data.format = "conversations"
    config.train.epochs = 1.0  # chosen
    config.optimizer.schedule = "cosine"  # chosen
    config.optimizer.warmup_fraction = 0.03  # chosen
    config.optimizer.weight_decay = 0.0  # chosen
    config.optimizer.final_fraction = 0.0  # chosen

    if size == "full":
        config.name = "sft"
        config.source = "upstage/SOLAR-10.7B-v1.0"  # or a run of configs/dus_48l.py
        config.fallback = "configs/sft.py:smollm2"
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
            "hf://datasets/c-s-ale/alpaca-gpt4-data",
            "hf://datasets/Open-Orca/OpenOrca/1M-GPT4-Augmented.parquet?limit=40e6",  # about 100,000 records
            "hf://datasets/meta-math/MetaMathQA?limit=15e6",  # about 52,000 records
        )
        config.data.template = "solar"
        config.data.sequence_length = 4096  # chosen
        config.data.holdout_every = 200  # chosen
        config.train.batch_size = 64  # chosen: 262,144 tokens a step
        config.train.accumulation = 0
        config.train.precision = "mixed"
        config.optimizer.learning_rate = 1e-5  # chosen
        config.evaluation.every = 50
        config.evaluation.windows = 64
        config.evaluation.batch_size = 64
        config.checkpoint.every = 50
        config.export.dtype = "bfloat16"
        return config

    config.name = "sft_smollm2"
    config.source = "smollm2"
    config.data.sources = ("pydoc-functions",)
    config.data.sequence_length = 512
    config.data.holdout_every = 8
    config.train.batch_size = 4
    config.train.remat = "matmuls"
    config.train.precision = "float32"
    config.optimizer.learning_rate = 5e-5
    config.evaluation.windows = 24
    config.evaluation.batch_size = 8
    config.checkpoint.every = 10
    config.checkpoint.keep = 1
    config.export.dtype = "float32"
    return config
