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


def _yarn(frequencies: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """YaRN (arXiv 2309.00071): low frequencies divided by HF `factor`, high ones kept, a ramp over the pairs between.

    The ramp runs between the pairs that make `beta_fast` and `beta_slow` turns within
    `original_max_position_embeddings`.
    """
    H, log_theta = cfg.head_dim, np.log(cfg.rope_theta)

    def pair(turns: float) -> float:
        return H * np.log(cfg.rope_original_positions / (turns * 2 * np.pi)) / (2 * log_theta)

    low, high = pair(cfg.rope_beta_fast), pair(cfg.rope_beta_slow)
    if not cfg.rope_untruncated:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0.0), min(high, H - 1.0)
    scaled = np.clip((np.arange(H // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return frequencies * (1.0 - scaled + scaled / cfg.rope_factor)


# ModelConfig.rope_scaling -> (float64 frequencies [H/2], cfg) -> scaled frequencies
SCALINGS: dict[str, Callable[[np.ndarray, ModelConfig], np.ndarray]] = {
    "": lambda frequencies, cfg: frequencies,
    "linear": _linear,
    "dynamic": lambda frequencies, cfg: frequencies,  # another theta for long rows: see `rope_frequencies`
    "llama3": _llama3,
    "yarn": _yarn,
}


def rope_frequencies(cfg: ModelConfig, length: int = 0) -> np.ndarray:
    """Frequency of each pair, float32 [H/2] radians per position: HF `rope_theta` ** (-2i / H), scaled per config.

    Computed in float64 at trace time: the error of a float32 power would grow with the position.

    Args:
      cfg: provides head_dim, rope_theta and rope scaling.
      length: T. Beyond `max_position_embeddings`, "dynamic" scaling raises theta.
    """
    theta, H = cfg.rope_theta, cfg.head_dim
    if cfg.rope_scaling == "dynamic":
        longer = max(1.0, length / cfg.max_position_embeddings)
        theta *= (cfg.rope_factor * longer - (cfg.rope_factor - 1.0)) ** (H / (H - 2))
    plain = theta ** (-np.arange(0, H, 2, dtype=np.float64) / H)
    return SCALINGS[cfg.rope_scaling](plain, cfg).astype(np.float32)


def rope_angles(positions: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Computes cosines and sines of the rotation at each position.

    Args:
      positions: [B, T] integers, each token's position in its document.
      cfg: provides head_dim, rope_theta and rope scaling.

    Returns:
      Two float32 arrays [B, T, H/2].
    """
    angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(cfg, positions.shape[-1])
    factor = cfg.rope_attention_factor or 1.0
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (x[i], x[i + H/2]) of `x` [B, T, N, H], in float32; same shape and dtype out."""
    cos, sin = (a[:, :, None, :] for a in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)
