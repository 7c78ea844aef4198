"""Projections in 8 bits against the same done by hand, and the gradients that pass through."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from solar_jax.config import ModelConfig
from solar_jax.model import llama
from solar_jax.model.matmul import plain_einsum
from solar_jax.model.quantised import NarrowWeight, narrowed, products, rounded_at_random
from solar_jax.model.shapes import LAYER_AXES

RNG = np.random.default_rng(0)
# Columns and rows of sizes far apart, which one scale for all would flatten.
X = (RNG.standard_normal((2, 6, 32)) * 10.0 ** RNG.uniform(-2, 2, (2, 6, 1))).astype(np.float32)
W = (RNG.standard_normal((32, 3, 8)) * 10.0 ** RNG.uniform(-1, 1, (1, 3, 8))).astype(np.float32)
G = RNG.standard_normal((2, 6, 3, 8)).astype(np.float32)


def rounded(x: np.ndarray, axis, kind: str) -> np.ndarray:
    """x as 8 bits hold it, its largest value along `axis` the largest there is."""
    largest, cast = {
        "int8": (127.0, np.rint),
        "e4m3": (448.0, lambda v: v.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)),
        "e5m2": (57344.0, lambda v: v.astype(ml_dtypes.float8_e5m2).astype(np.float32)),
    }[kind]
    scale = np.abs(x).max(axis=axis, keepdims=True) / np.float32(largest)
    return cast(np.clip(x / scale, -largest, largest)) * scale


def narrow(w: jax.Array, name: str, kind: str) -> NarrowWeight:
    return narrowed({"layers": {name: w}}, kind)["layers"][name]


def product(subscripts: str, x: jax.Array, weight: NarrowWeight) -> jax.Array:
    return products(plain_einsum, [subscripts], x, [weight])[0]


def relative(found, expected) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("kind", "forward", "backward"), [("int8", "int8", "int8"), ("fp8", "e4m3", "e5m2")])
def test_product_and_gradients_are_those_by_hand(kind, forward, backward):
    y, transpose = jax.vjp(
        lambda x, w: product("btd,dnh->btnh", x, narrow(w, "q_proj", kind)), jnp.array(X), jnp.array(W)
    )
    dx, dw = transpose(jnp.array(G))

    def close(found, expected, exact):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        assert 2e-3 < relative(expected, exact) < 0.1  # so that it is told from a product that is not quantised

    exact = np.einsum("btd,dnh->btnh", X, W)
    close(y, np.einsum("btd,dnh->btnh", rounded(X, 2, forward), rounded(W, 0, forward)), exact)
    # What passes to the activations is a product in 8 bits of the same rounded weight, whose scales, one an output, are
    # in the gradient before it is rounded.
    exact = np.einsum("btnh,dnh->btd", G, W)
    scale = np.abs(W).max(axis=0) / np.float32({"int8": 127, "e4m3": 448}[forward])
    close(dx, np.einsum("btnh,dnh->btd", rounded(G * scale, (2, 3), backward), rounded(W, 0, forward) / scale), exact)
    # The weight's is not.
    np.testing.assert_allclose(dw, np.einsum("btnh,btd->dnh", G, X), rtol=1e-4, atol=1e-3)


def test_with_weights_alone_in_8_bits_products_are_those_of_the_rounded_weight():
    y, transpose = jax.vjp(
        lambda x, w: product("btd,dnh->btnh", x, narrow(w, "q_proj", "int8_weights")), jnp.array(X), jnp.array(W)
    )
    held = rounded(W, 0, "int8")
    dx, dw = transpose(jnp.array(G))
    for found, subscripts, x, w in (
        (y, "btd,dnh->btnh", X, held),
        (dx, "btnh,dnh->btd", G, held),
        (dw, "btnh,btd->dnh", G, X),
    ):
        expected = np.einsum(subscripts, x, w)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert relative(y, np.einsum("btd,dnh->btnh", X, W)) > 2e-3
    narrow_product = product(
        "btd,dnh->btnh", jnp.array(X, jnp.bfloat16), narrow(jnp.array(W), "q_proj", "int8_weights")
    )
    assert narrow_product.dtype == jnp.bfloat16
    assert relative(narrow_product.astype(jnp.float32), np.asarray(y)) < 5e-3


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("name", "subscripts", "x", "w"),
    [
        ("o_proj", "btnh,nhd->btd", (2, 6, 3, 8), (3, 8, 32)),
        ("gate_proj", "btd,df->btf", (2, 6, 32), (32, 20)),
    ],
)
def test_every_projection_of_a_layer_is_taken(kind, name, subscripts, x, w):
    x, w = (jnp.array(RNG.standard_normal(shape), jnp.bfloat16) for shape in (x, w))
    found = product(subscripts, x, narrow(w, name, kind))
    exact = jnp.einsum(subscripts, x, w, preferred_element_type=jnp.float32)
    assert found.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)) < 0.05


@pytest.mark.parametrize("axes", [(), (3,), (2, 3)])  # of one layer, stacked layers, and stacks in turns
def test_weights_of_stacked_layers_are_rounded_one_by_one(axes):
    w = jnp.array(RNG.standard_normal((*axes, 3, 8, 32)) * 10.0 ** RNG.uniform(-1, 1, (*axes, 1, 1, 1)), jnp.float32)
    found = narrow(w, "o_proj", "int8")
    assert found.values.dtype == jnp.int8
    assert found.scale.shape == (*axes, 32)
    product = np.asarray(found.values).reshape(w.shape) * np.asarray(found.scale)[..., None, None, :]
    np.testing.assert_allclose(product, rounded(np.asarray(w), (-3, -2), "int8"), rtol=1e-6)


def test_a_row_or_column_of_zeros_gives_zeros_and_not_nan():
    x, w = jnp.array(X).at[0, 1].set(0.0), jnp.array(W).at[:, 1].set(0.0)
    y = product("btd,dnh->btnh", x, narrow(w, "q_proj", "int8"))
    assert (np.asarray(y)[0, 1] == 0).all()
    assert (np.asarray(y)[:, :, 1] == 0).all()
    assert np.isfinite(np.asarray(y)).all()


def test_the_weights_gradient_of_8_bits_is_exact_on_average():
    x, w, g = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 6, 24), (24, 32), (2, 6, 32)))
    exact = np.einsum("btd,btf->df", x, g)
    scale = np.abs(w).max(axis=0) / np.float32(127)
    mean = np.einsum("btd,btf->df", x, rounded(g * scale, 2, "int8") / scale)

    @jax.jit
    def gradient(factor):
        def summed(w):
            return jnp.vdot(product("btd,df->btf", jnp.array(x), narrow(w, "gate_proj", "int8_wgrad")), g * factor)

        return jax.grad(summed)(jnp.array(w))

    # Factors near 1, others for each token, hardly change what is rounded, but whether up or down.
    factors = 1 + 1e-4 * RNG.uniform(-1, 1, (200, 2, 6, 1)).astype(np.float32)
    found = np.array([gradient(factor) for factor in factors])
    assert 1e-3 < relative(found[0], exact) < 0.05
    assert (
        relative(found.mean(axis=0), mean) < relative(found[0], mean) / 4
    )  # the token that sets the scale does not vary
    np.testing.assert_array_equal(gradient(factors[0]), found[0])


def test_rounding_at_random_is_exact_on_average_and_independent_between_tokens():
    tokens = 40_000
    x = np.array([0.3, -0.8, 0.1, 1.7, 126.9], np.float32)
    factor = np.exp(RNG.uniform(-0.7, 0, (2, tokens // 2))).astype(np.float32)
    found = np.asarray(rounded_at_random(jnp.broadcast_to(x, (2, tokens // 2, 5)), jnp.array(factor)))
    error = found - x * factor[..., None]
    assert found.dtype == np.int8
    assert np.abs(error).max() < 1.001
    assert np.abs(error.mean(axis=(0, 1))).max() < 4 * 0.5 / np.sqrt(tokens)
    flat = error.reshape(tokens, 5)
    for step in (1, 2, 3, 64):
        correlation = (flat[step:] * flat[:-step]).mean(axis=0) / flat.var(axis=0)
        assert np.abs(correlation).max() < 4 / np.sqrt(tokens), step


def test_projections_of_one_input_share_its_rounding_and_add_up_their_gradients():
    weights = [jnp.array(RNG.standard_normal((32, 20)), jnp.float32) for _ in range(2)]
    gradients = [RNG.standard_normal((2, 6, 20)).astype(np.float32) * size for size in (1.0, 0.5)]

    def together(x):
        narrow_weights = [narrow(w, name, "int8") for w, name in zip(weights, ("gate_proj", "up_proj"), strict=True)]
        return products(plain_einsum, ["btd,df->btf"] * 2, x, narrow_weights)

    found, transpose = jax.vjp(together, jnp.array(X))
    for y, w, name in zip(found, weights, ("gate_proj", "up_proj"), strict=True):
        np.testing.assert_array_equal(y, product("btd,df->btf", jnp.array(X), narrow(w, name, "int8")))
    exact = sum(np.einsum("btf,df->btd", g, w) for g, w in zip(gradients, weights, strict=True))
    assert 1e-3 < relative(transpose([jnp.array(g) for g in gradients])[0], exact) < 0.02


CFG = ModelConfig(64, 32, 48, 3, 4, 2, 8, 128, 1e4, 1e-5, False)


@pytest.mark.parametrize(("kind", "remat"), [("int8", "none"), ("int8_wgrad", "full"), ("int8_weights", "full")])
def test_a_model_in_8_bits_has_nearly_the_gradients_of_float32(kind, remat):
    params, tokens = llama.initial_params(CFG, 0), jnp.arange(32).reshape(2, 16)

    def loss(params, projections):
        found = llama.logits(CFG, params, tokens, remat=remat, projections=projections)
        return jnp.mean(found * jnp.sin(jnp.arange(found.size)).reshape(found.shape))

    exact, found = (jax.grad(loss)(params, kind) for kind in ("", kind))
    for (path, x), y in zip(jax.tree.leaves_with_path(exact), jax.tree.leaves(found), strict=True):
        error = float(jnp.linalg.norm(x - y) / jnp.linalg.norm(x))
        assert error < 0.05, path
        assert (error > 1e-5) or path[-1].key not in LAYER_AXES, path  # a product in float32 has 1e-7
