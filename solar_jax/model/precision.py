"""Named precision policies: dtypes of weights, optimiser state and matmuls."""

import dataclasses
import importlib.util

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
    projections: str = ""  # a key of model.quantised.QTYPES if projections take narrower operands


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
    """Returns the precision policy of a run.

    Raises:
      UserError: the policy does not exist, or its package is not installed.
    """
    if cfg.precision not in PRECISIONS:
        raise UserError(f"config.train.precision must be one of {', '.join(PRECISIONS)}, found {cfg.precision!r}.")
    policy = PRECISIONS[cfg.precision]
    if policy.projections and importlib.util.find_spec("qwix") is None:
        raise UserError(
            f"config.train.precision={cfg.precision!r} needs the package qwix, which is not installed; it "
            "comes with the extra `quantised`."
        )
    return policy


def compute_dtype(cfg: TrainConfig) -> jnp.dtype:
    """Returns the dtype of a run's matmuls and activations."""
    return jnp.dtype(precision(cfg).compute)
