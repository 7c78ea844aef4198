"""Rope frequencies of real models against transformers', and the three regimes of llama3 by hand."""

import math

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from solar_jax.checkpoints.hf_config import model_config
from solar_jax.config import ModelConfig
from solar_jax.model.rope import rope_frequencies

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REAL = {
    "Llama 3.1 8B": (4096, 32, {"factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5} | LLAMA3),
    "Llama 3.2 1B": (2048, 32, {"factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5} | LLAMA3),
    "LongChat 7B": (4096, 32, {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}),
}


@pytest.mark.parametrize("name", REAL)
def test_the_frequencies_of_a_real_model_are_those_of_transformers(name):
    hidden, heads, rope = REAL[name]
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_attention_heads=heads, rope_parameters=rope, max_position_embeddings=131072
    )
    expected, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    assert scale == 1.0
    found = rope_frequencies(model_config(config.to_dict(), "config.json"))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)  # theirs are powers in float32


def test_llama3_keeps_what_turns_often_and_slows_what_does_not_turn_once():
    cfg = ModelConfig(
        head_dim=64,
        rope_theta=10000.0,
        rope_scaling="llama3",
        rope_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_original_positions=256,
    )
    found = rope_frequencies(cfg)
    regimes = {"kept": 0, "slowed": 0, "between": 0}
    for i in range(32):
        plain = 10000.0 ** (-2 * i / 64)
        turns = 256 * plain / (2 * math.pi)  # of the pair within the original length
        if turns >= 4.0:
            expected, regime = plain, "kept"
        elif turns <= 1.0:
            expected, regime = plain / 8, "slowed"
        else:
            share = (turns - 1.0) / (4.0 - 1.0)
            expected, regime = share * plain + (1 - share) * plain / 8, "between"
        regimes[regime] += 1
        assert found[i] == pytest.approx(expected, rel=1e-7), (i, regime)
    assert min(regimes.values()) >= 4
