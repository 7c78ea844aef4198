"""Streamed logits are the model's own, and what is kept of their blocks is what whole logits say."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tensor_table import TENSORS
from solar_jax.checkpoints.verify import streamed_logits
from solar_jax.checkpoints.verify.streamed_logits import Model, Pass, Step, all_logits, compare, stream
from solar_jax.model import llama
from tests.checkpoints.test_parity import MODELS, hf_model
from tests.conftest import TINY, save_hf

TOKENS = np.random.default_rng(1).integers(0, TINY["vocab_size"], (2, 300))


def model_of(c: Checkpoint) -> Model:
    return Model(c.cfg, lambda path, layer, rows: c.read(TENSORS[path].hf.format(layer), rows))


def streamed(model: Model, tokens: np.ndarray, layers: list[int] | None = None) -> Pass:
    """A run through the layers in order, or in another."""
    run = Pass(model, [(tokens, model.embed(tokens))])
    order = range(model.cfg.num_hidden_layers) if layers is None else layers
    stream([Step(lambda i=i: model.layer(i), (run,)) for i in order])
    return run


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, 1 << 24) for name in MODELS] + [("SmolLM2", 1 << 12), ("Llama, biases", 1 << 12)],
)
def test_they_are_the_models_own_and_transformers(tmp_path, monkeypatch, name, block):
    model = hf_model(name)
    c = open_checkpoint(str(save_hf(model, tmp_path / "m")))
    monkeypatch.setattr("solar_jax.checkpoints.checkpoint.BLOCK", block)  # the vocabulary in one block, or in several
    found = all_logits(streamed(model_of(c), TOKENS)).reshape(*TOKENS.shape, -1)
    own = np.asarray(llama.logits(c.cfg, load_params(c), jnp.array(TOKENS)))
    np.testing.assert_allclose(found, own, rtol=0, atol=1e-5)
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-4)
    assert np.abs(found).max() > 1


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("block", [1 << 24, 64 * 50, 64])
def test_distances_are_those_of_whole_logits(tiny, monkeypatch, block):
    monkeypatch.setattr("solar_jax.checkpoints.checkpoint.BLOCK", block)
    model = model_of(open_checkpoint(str(tiny)))
    a, b = streamed(model, TOKENS), streamed(model, TOKENS[:, :40], [0, 2, 1, 3, 4, 5])
    seen = np.concatenate([np.arange(40), 300 + np.arange(40)])
    ((found, none),) = (compare([(a, b, seen), (a, a, slice(None))]),)
    x, y = all_logits(a).astype(np.float64)[seen], all_logits(b).astype(np.float64)
    p, q = log_softmax(x), log_softmax(y)
    np.testing.assert_allclose(found.max_abs, np.abs(x - y).max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(found.same_top, x.argmax(axis=1) == y.argmax(axis=1))
    assert 0 < found.same_top.mean() < 1
    figures = found.over(slice(3, 9))
    assert figures["mean_kl"] == pytest.approx(found.kl[3:9].mean())
    assert none.over(slice(None)) == {"max_abs_difference": 0, "mean_kl": 0, "top1_agreement": 1}


def test_logits_of_hundreds_do_not_overflow_and_nan_is_not_hidden():
    sums = streamed_logits._Sums(2)
    a, b = np.array([[800.0, 0.0], [1.0, 2.0]], np.float32), np.array([[0.0, 800.0], [1.0, np.nan]], np.float32)
    sums.add(0, a[:, :1], b[:, :1])
    sums.add(1, a[:, 1:], b[:, 1:])
    found = sums.distance()
    assert found.kl[0] == 800
    assert np.isnan([found.kl[1], found.max_abs[1]]).all()
