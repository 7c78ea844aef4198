"""The way that SOLAR did not take: each layer's MLP becomes experts, instead of more layers (section 2 of the paper).

    python -m solar_jax.train --config configs/upcycle.py --workdir DIR
    python -m solar_jax.train --config configs/upcycle.py:smollm2 --workdir DIR

:mistral (the default)
  trains    Mistral 7B as 8 experts, 2 of them a token: Mixtral's shape, 46.7 B parameters, 12.9 B of them active
  needs     a TPU v5p-128; `plan` chooses mesh, remat and microbatches
  chosen    half of each expert's channels redrawn (Drop-Upcycling, arXiv 2502.19261); a lower peak rate than a dense
            run's, since upcycled models lose ground at that for thousands of steps

:smollm2, the same file at the size of a laptop
  trains    SmolLM2-135M as 2 experts, one of them a token: 214 M parameters, next to the 198 M of its dus(6), at the
            base's FLOPs
  needs     8 GiB of memory, some minutes on 2 cores
"""

import pathlib
import runpy

import ml_collections

from solar_jax.errors import UserError

SIZES = ("mistral", "smollm2")


def get_config(size: str = "mistral") -> ml_collections.ConfigDict:
    if size not in SIZES:
        raise UserError(f"configs/upcycle.py has the sizes {' and '.join(SIZES)}, found {size!r}.")
    dus = runpy.run_path(str(pathlib.Path(__file__).with_name("dus_48l.py")))["get_config"]
    config = dus("smollm2") if size == "smollm2" else dus()
    config.name = f"upcycle_{size}"
    config.fallback = "" if size == "smollm2" else "configs/upcycle.py:smollm2"
    config.growth.operator = "identity"
    config.growth.redrawn = 0.5
    if size == "smollm2":
        config.growth.experts, config.growth.top_k = 2, 1
        return config
    config.growth.experts, config.growth.top_k = 8, 2
    config.optimizer.learning_rate = 5e-6
    return config
