"""What training minimises."""

import jax
import jax.numpy as jnp


def next_token_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy in nats, and the number of targets it is over.

    Args:
      logits: [B, T, V] float32.
      targets: [B, T] integers.
      weights: [B, T] float32, 0 where a target does not count.

    Returns:
      Two float32 scalars; their quotient is the mean loss a token.
    """
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked)), jnp.sum(weights)
