"""FLOPs of training against numbers worked out by hand."""

import dataclasses

import pytest

from solar_jax.config import ModelConfig
from solar_jax.model.flops import flops_per_token, flops_per_token_in_part

# A layer has 8 x 2 x (2 x 4 + 2 x 2) + 3 x 8 x 10 = 192 + 240 = 432 weights, the head 8 x 100 = 800.
# Over 16 tokens a query sees 8 keys: 4 x 4 x 2 x 8 = 256 FLOPs of scores a layer.
CFG = ModelConfig(
    vocab_size=100, hidden_size=8, intermediate_size=10, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=2,
)  # fmt: skip


def test_all_of_a_model_costs_six_times_its_weights_and_three_times_its_scores():
    whole = flops_per_token_in_part(CFG, 16, trained=(True,) * 3, first=0, trains_head=True)
    assert whole == 6 * (3 * 432 + 800) + 3 * 3 * 256
    assert whole == flops_per_token(CFG, 16)
    windowed = dataclasses.replace(CFG, sliding_window=4)
    found = flops_per_token_in_part(windowed, 16, trained=(True,) * 3, first=0, trains_head=True)
    assert found == flops_per_token(windowed, 16)


@pytest.mark.parametrize(
    ("trained", "first", "trains_head", "expected"),
    [
        # The last layer alone: all forward, gradients by inputs of it and of the head, its weights.
        ((False, False, True), 2, False, 2 * (3 * 432 + 800) + 3 * 256 + 2 * (432 + 800) + 2 * 256 + 2 * 432),
        # The first layer alone: the frozen ones above it pass the gradient on.
        ((True, False, False), 0, False, 2 * (3 * 432 + 800) + 3 * 256 + 2 * (3 * 432 + 800) + 6 * 256 + 2 * 432),
        # All layers, the head frozen.
        ((True,) * 3, 0, False, 6 * 3 * 432 + 4 * 800 + 3 * 3 * 256),
    ],
)
def test_frozen_parts_cost_no_gradient_of_their_weights(trained, first, trains_head, expected):
    assert flops_per_token_in_part(CFG, 16, trained=trained, first=first, trains_head=trains_head) == expected
