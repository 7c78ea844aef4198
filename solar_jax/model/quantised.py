"""Projections with 8-bit matmul operands, through qwix."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# kind -> (dtype of activations and weights, dtype of gradients). 8-bit float gradients need the wider range of e5m2.
QTYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}


@functools.cache
def quantised_einsum(kind: str) -> Callable[[str, jax.Array, jax.Array], jax.Array]:
    """Returns an einsum for contractions: (subscripts, activations, weight) -> product in the activations' dtype.

    Each row of activations and each column of the weight has its own absmax scale. Gradients use the straight-through
    estimator: the gradient of the activations is an 8-bit product too, that of the weight, which sums over all tokens,
    is not (arXiv 2304.13013).
    """
    # qwix's trainable dot_general; its public API wraps modules, and there are none inside our scan.
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
