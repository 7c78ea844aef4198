"""Model FLOPs of training, and model FLOPs utilisation (MFU)."""

from solar_jax.config import ModelConfig


def flops_per_token(cfg: ModelConfig, sequence_length: int, *, causal: bool = True, adapters: bool = False) -> float:
    """Model FLOPs of training on one token, forward and backward.

    A matmul costs 2 FLOPs per weight and token, and its backward pass twice its forward pass: 6 x the weights of all
    matmuls, including the output projection but not the embedding look-up. Scores and their product with the values
    add 2 x 2 x N x H x S forward. Causal: a query sees T / 2 keys on average (at most the sliding window). Non-causal:
    all T keys, as many publications count. Rematerialisation is not counted. Where only `adapters` train, no gradient
    of a matmul's weights is computed: 4 x the weights.
    """
    D, F, L, V = cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers, cfg.vocab_size
    N, K, H = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    keys = sequence_length / 2 if causal else sequence_length
    if causal and cfg.sliding_window:
        keys = min(keys, cfg.sliding_window)
    weights = L * (D * H * (2 * N + 2 * K) + 3 * D * F) + D * V
    return (4 if adapters else 6) * weights + 3 * L * 4 * N * H * keys


def mfu(tokens_per_second: float, flops_a_token: float, peak: float | None, devices: int) -> float | None:
    """Model FLOPs utilisation, 0 to 1: achieved over peak model FLOP/s; None if the peak is unknown."""
    return None if peak is None else tokens_per_second * flops_a_token / (peak * devices)
