"""Parameters gathered for use on a mesh: how many collectives, and what comes out of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from solar_jax.model.llama import unconstrained
from solar_jax.parallel.collectives import constrain_on
from solar_jax.parallel.rules import PARAMETERS, spec
from tests.parallel.test_mesh import mesh_of

LETTERS = ("DNH", "DKH", "DKH", "NHD")  # q, k, v and o
SHAPES = ((32, 4, 8), (32, 2, 8), (32, 2, 8), (4, 8, 32))
RNG = np.random.default_rng(0)
WEIGHTS = tuple(RNG.standard_normal(shape).astype(np.float32) for shape in SHAPES)
FACTORS = tuple(RNG.standard_normal(shape).astype(np.float32) for shape in SHAPES)


def used(weights: tuple[jax.Array, ...], constrain: Any) -> tuple[jax.Array, Any]:
    gathered = constrain(weights, LETTERS)
    return sum(jnp.sum(jnp.square(w) * factor) for w, factor in zip(gathered, FACTORS, strict=True)), gathered


@pytest.mark.parametrize(("sizes", "gathers"), [((1, 4, 1), 1), ((2, 2, 1, 2), 1), ((1, 2, 2), 4), ((4, 1, 1), 0)])
def test_attentions_weights_are_gathered_as_one_and_their_gradients_rest_like_each(sizes, gathers):
    # Where heads are sharded, over tensor, they cannot be joined without moving them.
    mesh = mesh_of(*sizes)
    shardings = tuple(NamedSharding(mesh, spec(letters, PARAMETERS)) for letters in LETTERS)
    weights = tuple(map(jax.device_put, WEIGHTS, shardings))
    forward = jax.jit(lambda w: constrain_on(mesh)(w, LETTERS))
    assert forward.lower(weights).compile().as_text().count(" all-gather(") == gathers

    step = jax.jit(jax.grad(lambda w: used(w, constrain_on(mesh)), has_aux=True), out_shardings=(shardings, None))
    (gradients, gathered), expected = step(weights), jax.grad(lambda w: used(w, unconstrained)[0])(WEIGHTS)
    for weight, found, exact, gradient in zip(WEIGHTS, gathered, expected, gradients, strict=True):
        np.testing.assert_array_equal(found, weight)
        np.testing.assert_array_equal(gradient, exact)
