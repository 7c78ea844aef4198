"""Models from scratch: transformers reads what is written, values repeat by seed, and every mistake is one sentence."""

import numpy as np
import pytest
import transformers

from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.checkpoints.find import check_source
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.scratch import open_source
from solar_jax.config import ShapeConfig
from solar_jax.errors import UserError

SHAPE = ShapeConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    tie_word_embeddings=True,
)  # fmt: skip


def test_a_new_model_has_normal_matrices_and_norms_of_one_that_transformers_reads(tmp_path, tiny):
    c = open_source(f"scratch:{tiny}", SHAPE, seed=1)
    convert_checkpoint(c, Target(tmp_path / "out"), "convert")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (3, c.cfg.vocab_size)
    ours, theirs = load_params(c), dict(model.named_parameters())
    up = theirs["model.layers.1.mlp.up_proj.weight"].detach().numpy()
    np.testing.assert_array_equal(ours["layers"]["up_proj"][1], up.T)
    assert abs(up.std() / 0.02 - 1) < 0.1
    assert (theirs["model.layers.1.input_layernorm.weight"] == 1).all()


def test_a_seed_repeats_its_values_and_another_has_others(tiny):
    q = [np.asarray(load_params(open_source(f"scratch:{tiny}", SHAPE, s))["layers"]["q_proj"]) for s in (1, 1, 2)]
    np.testing.assert_array_equal(q[0], q[1])
    assert abs(np.corrcoef(q[0].ravel(), q[2].ravel())[0, 1]) < 0.15
    assert abs(np.corrcoef(q[0][0].ravel(), q[0][1].ravel())[0, 1]) < 0.25  # nor do layers repeat


def test_what_a_new_model_lacks_is_named(tiny):
    with pytest.raises(UserError, match=r"needs config\.model\.hidden_size"):
        open_source("scratch", ShapeConfig(), 0)
    with pytest.raises(UserError, match=r"vocab_size=100 is less than the"):
        open_source(f"scratch:{tiny}", ShapeConfig(**vars(SHAPE) | {"vocab_size": 100}), 0)
    with pytest.raises(UserError, match="no/where: no such"):
        check_source("scratch:./no/where")


def test_where_a_checkpoint_is_needed_a_new_model_is_refused_as_such(tiny):
    with pytest.raises(UserError, match=r"scratch: stands for a new model, which train, chain and prepare take"):
        open_checkpoint("scratch")
    with pytest.raises(UserError, match=f"scratch:{tiny}: stands for a new model"):
        open_checkpoint(f"scratch:{tiny}")
