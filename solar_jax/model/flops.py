"""Model FLOPs of training, and model FLOPs utilisation (MFU)."""

from collections.abc import Sequence

from solar_jax.config import ModelConfig
from solar_jax.model.shapes import parameter_count


def _layer_weights(cfg: ModelConfig) -> int:
    """Weights of a layer that multiply a token, norms and biases left out."""
    D, E, N, K = cfg.hidden_size, cfg.num_local_experts, cfg.num_attention_heads, cfg.num_key_value_heads
    mlp = 3 * D * cfg.intermediate_size * (cfg.num_experts_per_tok if E else 1) + D * E
    return D * cfg.head_dim * (2 * N + 2 * K) + mlp


def active_parameters(cfg: ModelConfig) -> int:
    """Parameters that a token uses: all but those of the experts that it does not go to."""
    idle = cfg.num_local_experts - cfg.num_experts_per_tok if cfg.num_local_experts else 0
    return parameter_count(cfg) - cfg.num_hidden_layers * idle * 3 * cfg.hidden_size * cfg.intermediate_size


def flops_per_token(cfg: ModelConfig, sequence_length: int, *, causal: bool = True, adapters: bool = False) -> float:
    """Model FLOPs of training on one token, forward and backward.

    A matmul costs 2 FLOPs per weight and token, and its backward pass twice its forward pass: 6 x the weights of all
    matmuls, including the output projection but not the embedding look-up. Scores and their product with the values
    add 2 x 2 x N x H x S forward. Causal: a query sees T / 2 keys on average (at most the sliding window). Non-causal:
    all T keys, as many publications count. Rematerialisation is not counted. Where only `adapters` train, no gradient
    of a matmul's weights is computed: 4 x the weights. Of experts, those of a token count alone.
    """
    D, L, V = cfg.hidden_size, cfg.num_hidden_layers, cfg.vocab_size
    N, H = cfg.num_attention_heads, cfg.head_dim
    keys = sequence_length / 2 if causal else sequence_length
    if causal and cfg.sliding_window:
        keys = min(keys, cfg.sliding_window)
    weights = L * _layer_weights(cfg) + D * V
    return (4 if adapters else 6) * weights + 3 * L * 4 * N * H * keys


def flops_per_token_in_part(
    cfg: ModelConfig, sequence_length: int, *, trained: Sequence[bool], first: int, trains_head: bool
) -> float:
    """Model FLOPs of training a part of a model on one token; those of `flops_per_token` where everything trains.

    Counted as there, with causal attention, in three terms:
      forward      2 x the weights of all L layers and of the output projection, and L x 4 x N x H x keys of scores
      by inputs    the same for the output projection, and for the layers from `first` on, whose scores count twice:
                   frozen layers pass the gradient on, and those below the lowest trained one have none
      by weights   2 x the weights of the trained layers alone, and of the output projection if it trains

    Args:
      cfg: the model.
      sequence_length: T.
      trained: [L], which layers train.
      first: the lowest layer that a gradient reaches; counted in full.
      trains_head: whether the output projection trains.
    """
    L, V, D = cfg.num_hidden_layers, cfg.vocab_size, cfg.hidden_size
    N, H = cfg.num_attention_heads, cfg.head_dim
    keys = min(sequence_length / 2, cfg.sliding_window or sequence_length)
    layer, head = _layer_weights(cfg), D * V
    scores = 4 * N * H * keys
    forward = 2 * (L * layer + head) + L * scores
    by_inputs = 2 * ((L - first) * layer + head) + 2 * (L - first) * scores
    by_weights = 2 * (sum(trained) * layer + trains_head * head)
    return forward + by_inputs + by_weights


def mfu(tokens_per_second: float, flops_a_token: float, peak: float | None, devices: int) -> float | None:
    """Model FLOPs utilisation, 0 to 1: achieved over peak model FLOP/s; None if the peak is unknown."""
    return None if peak is None else tokens_per_second * flops_a_token / (peak * devices)
