"""Plain attention against a softmax written out, and rows that lie end to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solar_jax.model.attention import attention, attention_mask, attention_of_rows, library_attention, rotated_attention

B, T, N, K, H = 3, 10, 6, 2, 8
SEGMENTS = np.array([[0] * 10, [0] * 4 + [1] * 6, [0] * 9 + [1]])


def arrays(*heads: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.array(rng.standard_normal((B, T, n, H)), jnp.float32) for n in heads]


@pytest.mark.parametrize("window", [0, 3])
def test_every_query_head_uses_its_key_head_and_sees_what_the_mask_says(window):
    q, k, v = (np.asarray(x, np.float64) for x in arrays(N, K, K))
    expected = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        first = max(0, t - window + 1) if window else 0
        seen = [s for s in range(first, t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]
        weights = np.exp([q[b, t, n] @ k[b, s, n // (N // K)] / np.sqrt(H) for s in seen])
        expected[b, t, n] = weights / weights.sum() @ v[b, seen, n // (N // K)]
    found = attention(*arrays(N, K, K), attention_mask(T, jnp.array(SEGMENTS), window))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rows_end_to_end_are_attended_apart():
    q, k, v = arrays(N, K, K)
    angles = np.random.default_rng(1).uniform(0, 2 * np.pi, (B, T, H // 2))
    rope = jnp.cos(angles), jnp.sin(angles)
    mask = attention_mask(T, jnp.array(SEGMENTS), 0)
    expected = rotated_attention(q, k, v, rope, mask).reshape(1, B * T, N, H)
    *qkv, cos, sin = (x.reshape(1, B * T, *x.shape[2:]) for x in (q, k, v, *rope))
    found = attention_of_rows(B, mask)(*qkv, (cos, sin), None)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    as_one = rotated_attention(*qkv, (cos, sin), attention_mask(B * T, None, 0))
    assert float(jnp.abs(as_one - expected).max()) > 0.1


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("segments", [None, jnp.array(SEGMENTS)])
def test_the_librarys_attention_sees_what_ours_sees(window, segments):
    """By its implementation for XLA: the other one, for GPUs, takes the same arguments."""
    q, k, v = arrays(N, K, K)
    angles = np.random.default_rng(1).uniform(0, 2 * np.pi, (B, T, H // 2))
    rope = jnp.cos(angles), jnp.sin(angles)
    found = library_attention(q, k, v, rope, segments, sliding_window=window, implementation="xla")
    expected = rotated_attention(q, k, v, rope, attention_mask(T, segments, window))
    np.testing.assert_allclose(found, expected, atol=1e-5)
