"""The loss against PyTorch's cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from solar_jax.model.llama import unembed
from solar_jax.training.objectives import head_loss, next_token_loss

RNG = np.random.default_rng(0)
LOGITS = (5 * RNG.standard_normal((3, 7, 11))).astype(np.float32)
TARGETS = RNG.integers(0, 11, (3, 7))
WEIGHTS = (RNG.random((3, 7)) < 0.6).astype(np.float32)


def reference(logits: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The weighted sum and its gradient."""
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    losses = torch.nn.functional.cross_entropy(x.reshape(-1, 11), torch.tensor(TARGETS).reshape(-1), reduction="none")
    loss = (torch.tensor(weights, dtype=torch.float64).reshape(-1) * losses).sum()
    loss.backward()
    return float(loss.detach()), x.grad.numpy()


@pytest.mark.parametrize("weights", [np.ones((3, 7), np.float32), WEIGHTS, 0.5 * WEIGHTS], ids=["one", "0/1", "half"])
def test_the_sum_and_its_gradient_are_torchs_cross_entropy(weights):
    def loss(x):
        return next_token_loss(x, jnp.array(TARGETS), jnp.array(weights))

    (found, targets), grad = jax.value_and_grad(loss, has_aux=True)(jnp.array(LOGITS))
    expected, expected_grad = reference(LOGITS, weights)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert float(targets) == pytest.approx(weights.sum(), rel=1e-6)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-6)


def test_a_target_of_weight_zero_changes_nothing():
    other = np.where(WEIGHTS > 0, TARGETS, (TARGETS + 1) % 11)
    found = [next_token_loss(jnp.array(LOGITS), jnp.array(t), jnp.array(WEIGHTS)) for t in (TARGETS, other)]
    assert found[0] == found[1]


def test_large_logits_give_no_infinity():
    # exp of 200 overflows float32
    found, _ = next_token_loss(jnp.array(40 * LOGITS), jnp.array(TARGETS), jnp.array(WEIGHTS))
    assert float(found) == pytest.approx(reference(40 * LOGITS, WEIGHTS)[0], rel=1e-6)


HIDDEN = RNG.standard_normal((4, 6, 5)).astype(np.float32)
HEAD = RNG.standard_normal((5, 11)).astype(np.float32)
LABELS = jnp.array(RNG.integers(0, 11, (4, 6))), jnp.array((RNG.random((4, 6)) < 0.6).astype(np.float32))


@pytest.mark.parametrize(("chunks", "shards"), [(1, 1), (3, 1), (6, 2), (2, 4)])
def test_the_loss_in_chunks_is_the_loss_of_all_logits_with_its_gradients(chunks, shards):
    def whole(x, head):
        return 3 * next_token_loss(unembed(x, head), *LABELS)[0]  # 3: the gradient that arrives is not one

    def chunked(x, head):
        return 3 * head_loss(x, head, *LABELS, chunks=chunks, shards=shards)[0]

    (found, gradients), (expected, expected_gradients) = (
        jax.value_and_grad(f, argnums=(0, 1))(jnp.array(HIDDEN), jnp.array(HEAD)) for f in (chunked, whole)
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    loss, targets = head_loss(jnp.array(HIDDEN), jnp.array(HEAD), *LABELS, chunks=chunks, shards=shards)  # no gradient
    assert (float(loss), float(targets)) == pytest.approx((float(expected) / 3, float(LABELS[1].sum())), rel=1e-6)


def test_a_step_of_the_loss_in_chunks_holds_no_logits_of_the_whole_row():
    rows, length, vocab = 2, 64, 512
    x, head = jax.ShapeDtypeStruct((rows, length, 8), jnp.float32), jax.ShapeDtypeStruct((8, vocab), jnp.float32)
    labels = jnp.zeros((rows, length), int), jnp.ones((rows, length))

    def temporaries(chunks: int) -> int:
        step = jax.jit(jax.grad(lambda x, h: head_loss(x, h, *labels, chunks=chunks)[0], argnums=(0, 1)))
        return step.lower(x, head).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) < temporaries(1) / 3
