"""Matmuls of activations and weights, true float32 where the activations are."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (subscripts, activations, weight) -> their product in the activations' dtype
Einsum = Callable[[str, jax.Array, jax.Array], jax.Array]


def parts_of(F: int) -> int:
    """Returns the number of parts, up to 16, in which a sum over F is computed in float32."""
    return next(n for n in (16, 8, 4, 2, 1) if F % n == 0)


def plain_einsum(subscripts: str, x: jax.Array, weight: jax.Array, out: Any = None) -> jax.Array:
    """Einsum in x's dtype; float32 is true float32 on TPU too, where the default is bfloat16 passes.

    Contracts x's last axes with the weight's first ones. A batch of one is multiplied as a matrix, so that its gradient
    contracts a single axis; for two axes XLA on CPU would copy both operands, transposed.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    weight = weight.astype(x.dtype)
    if x.shape[0] > 1:
        return jnp.einsum(subscripts, x, weight, precision=precision, preferred_element_type=out)
    ours, theirs = subscripts.split("->")[0].split(",")
    summed = sum(letter in ours for letter in theirs)
    matrix = weight.reshape(math.prod(weight.shape[:summed]), -1)
    y = jnp.matmul(x.reshape(-1, matrix.shape[0]), matrix, precision=precision, preferred_element_type=out)
    return y.reshape(*x.shape[:-summed], *weight.shape[summed:])


@jax.custom_vjp
def _product_in_parts(h: jax.Array, weight: jax.Array) -> jax.Array:
    """[B, T, F] x [F, D] -> [B, T, D], summed in up to 16 parts of F; the gradient is the plain product's."""
    B, T, F = h.shape
    parts = parts_of(F)
    h, weight = h.reshape(B, T, parts, F // parts), weight.reshape(parts, F // parts, -1)
    return jnp.sum(jnp.einsum("btpf,pfd->pbtd", h, weight, precision=jax.lax.Precision.HIGHEST), axis=0)


def _plain_gradient(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradient of [B, T, F] x [F, D] -> [B, T, D] with respect to both operands, from the saved operands."""
    h, weight = saved
    (dh,) = jax.linear_transpose(lambda h: plain_einsum("btf,fd->btd", h, weight), h)(g)
    (d_weight,) = jax.linear_transpose(lambda weight: plain_einsum("btf,fd->btd", h, weight), weight)(g)
    return dh, d_weight


_product_in_parts.defvjp(lambda h, weight: (_product_in_parts(h, weight), (h, weight)), _plain_gradient)


def down_projection(einsum: Einsum) -> Einsum:
    """Returns the einsum of [B, T, F] x [F, D] -> [B, T, D]; in float32, summed in parts of F.

    SwiGLU's few huge activations swamp the small terms of one long float32 sum, which by itself shifts the logits of a
    real model by 1e-4. Narrower dtypes accumulate in float32 anyway and take the plain product.
    """

    def product(subscripts: str, h: jax.Array, weight: Any) -> jax.Array:
        in_parts = h.dtype == jnp.float32 and isinstance(weight, jax.Array)  # not so an 8-bit weight with its scales
        return _product_in_parts(h, weight) if in_parts else einsum(subscripts, h, weight)

    return product
