"""A model from scratch in five steps as one command: a small model, more data, training on, growth, and fine-tuning.

    python -m solar_jax.chain --config configs/scratch_chain.py --workdir DIR
    python -m solar_jax.chain --config configs/scratch_chain.py:stdlib --workdir DIR

The first stage is configs/scratch.py, which grows while it trains; the second tunes the result on conversations.
"""

import ml_collections

from solar_jax.errors import UserError

SIZES = {"full": ("scratch", "sft", 7.0e7), "stdlib": ("scratch:stdlib", "sft:smollm2", 4.7e4)}


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    if size not in SIZES:
        raise UserError(f"configs/scratch_chain.py has the sizes {' and '.join(SIZES)}, found {size!r}.")
    pretraining, tuning, tokens = SIZES[size]
    stages = (
        {"name": "pretrain", "config": pretraining},
        {"name": "sft", "config": tuning, "start": "pretrain", "tokens": tokens},
    )
    measures = (pretraining, tuning)
    rest = {"tasks": (), "task_limit": 0, "task_data": "", "task_path": ""}
    return ml_collections.ConfigDict(
        {"name": f"scratch_{size}", "stages": stages, "measures": measures, **rest}, convert_dict=False
    )
