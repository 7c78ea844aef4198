"""Named precision policies: dtypes of weights, optimiser state and matmuls."""

import dataclasses

import jax.numpy as jnp

from solar_jax.config import TrainConfig
from solar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of one policy. Norm scales, biases, softmax, loss and rotary angles are always float32.

    bfloat16 weights and moments are rounded stochastically after each step (training.stochastic_rounding).
    """

    weights: str  # trained matrices
    moments: str  # optimiser moments of those matrices
    compute: str  # matmuls and activations
    projections: str = ""  # a key of model.quantised.NARROW_KINDS if projections have narrower weights or operands


# config.train.precision
PRECISIONS = {
    "float32": Precision("float32", "float32", "float32"),
    "mixed": Precision("float32", "float32", "bfloat16"),
    "bf16_moments": Precision("float32", "bfloat16", "bfloat16"),
    "bf16": Precision("bfloat16", "bfloat16", "bfloat16"),
    "int8_weights": Precision("float32", "float32", "bfloat16", "int8_weights"),
    "int8": Precision("float32", "float32", "bfloat16", "int8"),
    "int8_wgrad": Precision("float32", "float32", "bfloat16", "int8_wgrad"),
    "fp8": Precision("float32", "float32", "bfloat16", "fp8"),
}


def precision(cfg: TrainConfig) -> Precision:
    """Returns the precision policy of a run.

    Raises:
      UserError: the policy does not exist.
    """
    if cfg.precision not in PRECISIONS:
        raise UserError(f"config.train.precision must be one of {', '.join(PRECISIONS)}, found {cfg.precision!r}.")
    return PRECISIONS[cfg.precision]


def compute_dtype(cfg: TrainConfig) -> jnp.dtype:
    """Returns the dtype of a run's matmuls and activations."""
    return jnp.dtype(precision(cfg).compute)
