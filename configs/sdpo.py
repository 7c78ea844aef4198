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

import pathlib
import runpy

import ml_collections

from solar_jax.errors import UserError


def get_config(size: str = "full") -> ml_collections.ConfigDict:
    if size not in ("full", "smollm2"):
        raise UserError(f"configs/sdpo.py has the sizes full and smollm2, found {size!r}.")
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("dpo.py")))["get_config"](size)
    if size == "full":
        config.name, config.fallback = "sdpo", "configs/sdpo.py:smollm2"
        config.preferences.chunks = "source"
    else:
        config.name = "sdpo_smollm2"
        config.preferences.chunks = "difficulty:2"
    return config
