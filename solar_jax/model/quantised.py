"""Projections whose operands are 8 bits wide while they are multiplied, through qwix."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# kind -> (what activations and weights become, what gradients become). Floats of 8 bits need range for gradients.
QTYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}


@functools.cache
def quantised_einsum(kind: str) -> Callable[[str, jax.Array, jax.Array], jax.Array]:
    """(subscripts, activations, weight) -> their product in the activations' dtype, for an einsum of contractions.

    Every row of activations and every column of the weight has a scale of its own, its largest value's. The gradient
    goes straight through the rounding: that of the activations is a product in 8 bits too, that of the weight, which
    sums over all tokens, is not (arXiv 2304.13013).
    """
    # qwix's trainable product; what it exports wraps it in modules, which there are none of within our scan.
    from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt

    forward, backward = QTYPES[kind]
    config = DotGeneralQtConfig(
        lhs_qtype=forward, rhs_qtype=forward, dlhs_grad_qtype=backward, dlhs_residual_qtype=forward,
        use_original_residuals=True,
    )  # fmt: skip

    def einsum(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
        operands, _ = subscripts.split("->")
        of_x, of_weight = operands.split(",")
        shared = [letter for letter in of_x if letter in of_weight]
        contracted = [of_x.index(a) for a in shared], [of_weight.index(a) for a in shared]
        return dot_general_qt(x, weight.astype(x.dtype), (contracted, ([], [])), config)

    return einsum
