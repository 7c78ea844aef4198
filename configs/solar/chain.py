"""SOLAR 10.7B-Instruct from its base, stage by stage (arXiv 2312.15166): the whole recipe as one command.

    python -m solar_jax.chain --config configs/solar/chain.py --workdir DIR
    python -m solar_jax.chain --config configs/solar/chain.py:smollm2 --workdir DIR
    python -m solar_jax.plan --config configs/solar/chain.py --slice v5p-128

Each stage is a config that runs alone too: Depth Up-Scaling and continued pretraining, instruction tuning, alignment in
one pass and in chunks, and a merge of both aligned models, in four ways, of which the best is written.

Full size
  needs     what its stages need: a TPU v5p-128; `plan` gives hours and dollars of each
  chosen    which two candidates are merged, since the paper names only their scores

:smollm2, the same file at the size of a laptop
  trains    SmolLM2-135M-Instruct, 30 -> 48 layers, with no data but what Python and the packages bring
  needs     8 GiB of memory, 20 GB of disk, about half an hour on 2 cores
"""

import ml_collections

from solar_jax.errors import UserError

# Training tokens of the stages that count epochs, for plans only.
TOKENS = {"full": {"sft": 7.0e7, "dpo": 8.0e7, "sdpo": 8.0e7}, "smollm2": {"sft": 4.7e4, "dpo": 3.2e4, "sdpo": 3.2e4}}


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    if size not in TOKENS:
        raise UserError(f"configs/solar/chain.py has the sizes full and smollm2, found {size!r}.")
    tokens, argument = TOKENS[size], "" if size == "full" else f":{size}"
    stages = (
        {"name": "grow", "config": f"dus_48l{argument}", "changes": {"train.control": False}},
        {"name": "sft", "config": f"sft{argument}", "start": "grow", "tokens": tokens["sft"]},
        {"name": "dpo", "config": f"dpo{argument}", "start": "sft", "tokens": tokens["dpo"]},
        {"name": "sdpo", "config": f"sdpo{argument}", "start": "sft", "tokens": tokens["sdpo"]},
        {
            "name": "merge",
            "models": ("sdpo", "dpo"),
            "candidates": "paper",
            "eval_config": f"dpo{argument}",
            "reference": "sft",
        },
    )
    return ml_collections.ConfigDict(
        {
            "name": f"solar_{size}",
            "stages": stages,
            "measures": tuple(f"{name}{argument}" for name in ("dus_48l", "sft", "dpo")),
            "tasks": (),  # h6, for the paper's six benchmarks after each stage; needs the extra `eval`
            "task_limit": 0,  # items of each; 0: all
            "task_data": "",  # folder of the benchmarks' files; "": the hub
            "task_path": "",  # folder of tasks in lm-eval's layout
        },
        convert_dict=False,
    )
