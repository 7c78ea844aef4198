"""Projections in 8 bits against the same done by hand, and the gradients that pass through."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from solar_jax.model.quantised import quantised_einsum

RNG = np.random.default_rng(0)


def skewed(*shape: int) -> np.ndarray:
    """Both signs, the values largest in size positive: of -127.5 the last bit would decide what it is rounded to."""
    return np.exp(RNG.standard_normal(shape)) - 0.3


# Columns and rows of sizes far apart, which one scale for all would flatten.
X = (skewed(2, 6, 32) * 10.0 ** RNG.uniform(-2, 2, (2, 6, 1))).astype(np.float32)
W = (skewed(32, 3, 8) * 10.0 ** RNG.uniform(-1, 1, (1, 3, 8))).astype(np.float32)
G = skewed(2, 6, 3, 8).astype(np.float32)


def rounded(x: np.ndarray, axis, kind: str) -> np.ndarray:
    """x as 8 bits hold it, its largest value along `axis` the largest there is."""
    largest, cast = {
        "int8": (127.5, lambda v: np.clip(np.rint(v), -128, 127)),
        "e4m3": (448.0, lambda v: v.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)),
        "e5m2": (57344.0, lambda v: v.astype(ml_dtypes.float8_e5m2).astype(np.float32)),
    }[kind]
    assert (np.abs(x).max(axis=axis) == x.max(axis=axis)).all()
    scale = x.max(axis=axis, keepdims=True) / np.float32(largest)
    return cast(np.clip(x / scale, -largest, largest)) * scale


@pytest.mark.parametrize(("kind", "forward", "backward"), [("int8", "int8", "int8"), ("fp8", "e4m3", "e5m2")])
def test_product_and_gradients_are_those_by_hand(kind, forward, backward):
    einsum = quantised_einsum(kind)
    y, transpose = jax.vjp(lambda x, w: einsum("btd,dnh->btnh", x, w), jnp.array(X), jnp.array(W))
    dx, dw = transpose(jnp.array(G))

    def close(found, expected, exact):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        error = np.linalg.norm(expected - exact) / np.linalg.norm(exact)
        assert 2e-3 < error < 0.1  # so that it is told from a product that is not quantised

    exact = np.einsum("btd,dnh->btnh", X, W)
    close(y, np.einsum("btd,dnh->btnh", rounded(X, 2, forward), rounded(W, 0, forward)), exact)
    # What passes to the activations is a product in 8 bits: a scale a token, and one a row of the weight.
    exact = np.einsum("btnh,dnh->btd", G, W)
    close(dx, np.einsum("btnh,dnh->btd", rounded(G, (2, 3), backward), rounded(W, (1, 2), forward)), exact)
    # The weight's is not.
    np.testing.assert_allclose(dw, np.einsum("btnh,btd->dnh", G, X), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("subscripts", "x", "w"),
    [("btnh,nhd->btd", (2, 6, 3, 8), (3, 8, 32)), ("btd,df->btf", (2, 6, 32), (32, 20))],
)
def test_every_projection_of_a_layer_is_taken(kind, subscripts, x, w):
    x, w = (jnp.array(RNG.standard_normal(shape), jnp.bfloat16) for shape in (x, w))
    found = quantised_einsum(kind)(subscripts, x, w)
    exact = jnp.einsum(subscripts, x, w, preferred_element_type=jnp.float32)
    assert found.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)) < 0.05
