"""Precision as one policy: what weights, optimiser state and matmuls are kept and computed in, by name."""

import dataclasses

import jax.numpy as jnp

from solar_jax.config import TrainConfig
from solar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes. Norm scales, biases, softmax, loss and rotary angles are float32 whatever it says."""

    weights: str  # the matrices that training moves
    moments: str  # of the optimiser, one for each weight
    compute: str  # of matmuls and activations


# config.train.precision
PRECISIONS = {
    "float32": Precision("float32", "float32", "float32"),
    "mixed": Precision("float32", "float32", "bfloat16"),
}


def precision(cfg: TrainConfig) -> Precision:
    """The policy of a run.

    Raises:
      UserError: no such policy.
    """
    if cfg.precision not in PRECISIONS:
        raise UserError(f"config.train.precision must be one of {', '.join(PRECISIONS)}, found {cfg.precision!r}.")
    return PRECISIONS[cfg.precision]


def compute_dtype(cfg: TrainConfig) -> jnp.dtype:
    """Of a run's matmuls and activations."""
    return jnp.dtype(precision(cfg).compute)
