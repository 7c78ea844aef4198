"""Precision as one policy: what weights, optimiser state and matmuls are kept and computed in, by name."""

import dataclasses
import importlib.util

import jax.numpy as jnp

from solar_jax.config import TrainConfig
from solar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes. Norm scales, biases, softmax, loss and rotary angles are float32 whatever it says.

    Weights and moments in bfloat16 are rounded stochastically after each step (training.stochastic_rounding).
    """

    weights: str  # the matrices that training moves
    moments: str  # what the optimiser keeps for them
    compute: str  # of matmuls and activations
    projections: str = ""  # a name of model.quantised.QTYPES, where their operands are narrower


# config.train.precision
PRECISIONS = {
    "float32": Precision("float32", "float32", "float32"),
    "mixed": Precision("float32", "float32", "bfloat16"),
    "bf16_moments": Precision("float32", "bfloat16", "bfloat16"),
    "bf16": Precision("bfloat16", "bfloat16", "bfloat16"),
    "int8": Precision("float32", "float32", "bfloat16", "int8"),
    "fp8": Precision("float32", "float32", "bfloat16", "fp8"),
}


def precision(cfg: TrainConfig) -> Precision:
    """The policy of a run.

    Raises:
      UserError: no such policy, or its package is missing.
    """
    if cfg.precision not in PRECISIONS:
        raise UserError(f"config.train.precision must be one of {', '.join(PRECISIONS)}, found {cfg.precision!r}.")
    policy = PRECISIONS[cfg.precision]
    if policy.projections and importlib.util.find_spec("qwix") is None:
        raise UserError(
            f"config.train.precision={cfg.precision!r} needs the package qwix, which is not installed (the extra "
            "`quantised`)."
        )
    return policy


def compute_dtype(cfg: TrainConfig) -> jnp.dtype:
    """Of a run's matmuls and activations."""
    return jnp.dtype(precision(cfg).compute)
