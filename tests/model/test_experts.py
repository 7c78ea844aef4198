"""Routing and the experts' MLPs, against loops over tokens and transformers' Mixtral."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from solar_jax.config import ModelConfig
from solar_jax.model import experts
from solar_jax.model.experts import grouped_mlp, route, router_losses

B, T, D, F, E, k = 2, 9, 16, 24, 5, 2
CFG = ModelConfig(num_local_experts=E, num_experts_per_tok=k)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"h": (B, T, D), "router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    return {name: jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32) for name, shape in shapes.items()}


def by_token(h, weights, chosen, gate, up, down, experts=range(E)) -> np.ndarray:
    """Each token's experts, one after the other."""
    out = np.zeros(h.shape, np.float64)
    for b, t in np.ndindex(*h.shape[:2]):
        for share, e in zip(np.asarray(weights)[b, t], np.asarray(chosen)[b, t], strict=True):
            if e in experts:
                x = np.asarray(h[b, t], np.float64)
                g = x @ np.asarray(gate[e], np.float64)
                out[b, t] += share * (
                    (g / (1 + np.exp(-g)) * (x @ np.asarray(up[e], np.float64))) @ np.asarray(down[e])
                )
    return out


def matrices(arrays):
    return arrays["gate"], arrays["up"], arrays["down"]


def test_grouped_experts_are_those_of_a_loop_over_tokens(arrays):
    weights, chosen, _ = route(arrays["h"], arrays["router"], CFG)
    found = grouped_mlp(arrays["h"], weights, chosen, *matrices(arrays))
    expected = by_token(arrays["h"], weights, chosen, *matrices(arrays))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    with pytest.raises(AssertionError):  # negative control: another order of the experts
        np.testing.assert_allclose(
            found, by_token(arrays["h"], weights, (chosen + 1) % E, *matrices(arrays)), atol=1e-3
        )


def test_an_expert_of_another_device_adds_nothing(arrays):
    weights, chosen, _ = route(arrays["h"], arrays["router"], CFG)
    half = [x[2:4] for x in matrices(arrays)]
    found = grouped_mlp(arrays["h"], weights, chosen - 2, *half)
    np.testing.assert_allclose(
        found, by_token(arrays["h"], weights, chosen, *matrices(arrays), experts=(2, 3)), atol=2e-6
    )


def test_what_kernels_leave_in_rows_of_no_expert_reaches_neither_result_nor_gradients(arrays, monkeypatch):
    weights, chosen, _ = route(arrays["h"], arrays["router"], CFG)
    half = [x[2:4] for x in matrices(arrays)]

    def result_and_gradients():
        def loss(h, shares):
            out = grouped_mlp(h, shares, chosen - 2, *half)
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(arrays["h"], weights)

    expected, product = result_and_gradients(), experts._grouped

    def beyond(x, sizes):
        return jnp.where(jnp.arange(len(x))[:, None] < jnp.sum(sizes), x, jnp.nan)

    @jax.custom_vjp
    def leaving(x, weight, sizes):
        return beyond(product(x, weight, sizes), sizes)

    def forward(x, weight, sizes):
        return leaving(x, weight, sizes), (x, weight, sizes)

    def backward(saved, g):
        x, weight, sizes = saved
        inside = jnp.where(jnp.arange(len(g))[:, None] < jnp.sum(sizes), g, 0.0)
        dx, dw = jax.vjp(lambda x, w: product(x, w, sizes), x, weight)[1](inside)
        return beyond(dx, sizes), dw, None

    leaving.defvjp(forward, backward)
    monkeypatch.setattr(experts, "_grouped", leaving)
    for found, exact in zip(jax.tree.leaves(result_and_gradients()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, exact)


@pytest.mark.parametrize("normalised", [True, False])
def test_gradients_reach_the_router_and_each_expert_as_in_a_dense_sum(arrays, normalised):
    cfg = dataclasses.replace(CFG, norm_topk_prob=normalised)

    def grouped(a):
        weights, chosen, _ = route(a["h"], a["router"], cfg)
        return jnp.sum(jnp.sin(grouped_mlp(a["h"], weights, chosen, a["gate"], a["up"], a["down"])))

    def dense(a):
        logits = a["h"] @ a["router"]
        probability = jax.nn.softmax(logits, axis=-1)
        kept = jnp.where(logits >= jnp.sort(logits, axis=-1)[..., -k, None], probability, 0.0)
        kept = kept / jnp.sum(kept, axis=-1, keepdims=True) if normalised else kept
        g, u = (jnp.einsum("btd,edf->btef", a["h"], a[name]) for name in ("gate", "up"))
        return jnp.sum(jnp.sin(jnp.einsum("bte,btef,efd->btd", kept, jax.nn.silu(g) * u, a["down"])))

    assert abs(grouped(arrays) - dense(arrays)) < 1e-5
    for found, expected in zip(*(jax.tree.leaves(jax.grad(f)(arrays)) for f in (grouped, dense)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_router_losses_are_transformers_own_and_by_hand(arrays):
    loads = route(arrays["h"], arrays["router"], CFG)[2]
    found = router_losses(jax.tree.map(lambda x: x[None], loads))
    logits = np.asarray(arrays["h"] @ arrays["router"]).reshape(-1, E)
    theirs = load_balancing_loss_func((torch.tensor(logits),), E, k)
    assert abs(k * float(found["balance"]) - float(theirs)) < 1e-5  # theirs counts each of the k choices as one
    assert abs(float(found["z"]) - np.mean(np.log(np.exp(logits).sum(1)) ** 2)) < 1e-5
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert abs(float(found["entropy"]) + np.mean(np.sum(p * np.log(p), axis=1))) < 1e-5
    shares = np.bincount(np.argsort(-logits, axis=1)[:, :k].reshape(-1), minlength=E) / (k * len(logits))
    np.testing.assert_allclose([found["least_load"], found["most_load"]], [shares.min(), shares.max()], atol=1e-6)


def test_tokens_without_weight_count_in_no_routing_sum(arrays):
    counted = jnp.zeros((B, T)).at[:, :4].set(1.0)
    found = route(arrays["h"], arrays["router"], CFG, counted)[2]
    expected = route(arrays["h"][:, :4], arrays["router"], CFG)[2]
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
