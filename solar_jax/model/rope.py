"""Rotary position embedding in Hugging Face's half-split layout."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from solar_jax.config import ModelConfig


def _linear(frequencies: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """Linear scaling by HF `factor`: every position counts as 1 / factor."""
    return frequencies / cfg.rope_factor


def _llama3(frequencies: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """Llama 3.1 scaling: low frequencies divided by HF `factor`, high ones kept, a linear blend in between.

    The criterion is the number of turns of a pair within `original_max_position_embeddings`: `high_freq_factor` or more
    is kept, `low_freq_factor` or fewer is scaled.
    """
    turns = cfg.rope_original_positions * frequencies / (2 * np.pi)
    low, high = cfg.rope_low_freq_factor, cfg.rope_high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / cfg.rope_factor)


# ModelConfig.rope_scaling -> (float64 frequencies [H/2], cfg) -> scaled frequencies
SCALINGS: dict[str, Callable[[np.ndarray, ModelConfig], np.ndarray]] = {
    "": lambda frequencies, cfg: frequencies,
    "linear": _linear,
    "llama3": _llama3,
}


def rope_frequencies(cfg: ModelConfig) -> np.ndarray:
    """Frequency of each pair, float32 [H/2] radians per position: HF `rope_theta` ** (-2i / H), scaled per config.

    Computed in float64 at trace time: the error of a float32 power would grow with the position.
    """
    plain = cfg.rope_theta ** (-np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
    return SCALINGS[cfg.rope_scaling](plain, cfg).astype(np.float32)


def rope_angles(positions: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Computes cosines and sines of the rotation at each position.

    Args:
      positions: [B, T] integers, each token's position in its document.
      cfg: provides head_dim, rope_theta and rope scaling.

    Returns:
      Two float32 arrays [B, T, H/2].
    """
    angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(cfg)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (x[i], x[i + H/2]) of `x` [B, T, N, H], in float32; same shape and dtype out."""
    cos, sin = (a[:, :, None, :] for a in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)
