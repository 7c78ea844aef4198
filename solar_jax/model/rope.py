"""Rotary position embedding in Hugging Face's half-split layout."""

import jax
import jax.numpy as jnp
import numpy as np


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation of each position.

    Args:
      positions: [B, T] integers, a token's place in its document.
      head_dim: H.
      theta: base of the frequencies, HF `rope_theta`; frequency i is theta ** (-2i / H).

    Returns:
      Two float32 arrays [B, T, H/2].
    """
    # In float64 while tracing: an error of a float32 power would grow with the position.
    frequencies = (theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (x[i], x[i + H/2]) of `x` [B, T, N, H], in float32; same shape and dtype out."""
    cos, sin = (a[:, :, None, :] for a in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)
