"""Every sampler's distribution is transformers', and a row's draws depend on its own seed and step alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from solar_jax.decoding.sampling import Sampling, next_tokens, processed, settings_of
from solar_jax.errors import UserError

V = 200
LOGITS = 3 * np.random.default_rng(0).standard_normal((1, V)).astype(np.float32)
PROMPT = [3, 7, 7, 150]
CASES = {
    "temperature": Sampling(temperature=0.7),
    "top_k": Sampling(temperature=1.0, top_k=5),
    "top_k of more than all": Sampling(temperature=1.0, top_k=1000),
    "top_p": Sampling(temperature=1.0, top_p=0.6),
    "top_p that keeps one": Sampling(temperature=1.0, top_p=0.01),
    "min_p": Sampling(temperature=1.0, min_p=0.1),
    "penalty": Sampling(temperature=1.0, repetition_penalty=1.3),
    "all": Sampling(temperature=1.4, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
}


def theirs(case: Sampling) -> np.ndarray:
    ids, scores = torch.tensor([PROMPT]), torch.from_numpy(LOGITS.copy())
    steps = [transformers.RepetitionPenaltyLogitsProcessor(case.repetition_penalty)]
    steps += [transformers.TemperatureLogitsWarper(case.temperature)]
    steps += [transformers.TopKLogitsWarper(case.top_k)] if case.top_k else []
    steps += [transformers.TopPLogitsWarper(case.top_p)] if case.top_p < 1 else []
    steps += [transformers.MinPLogitsWarper(case.min_p)] if case.min_p else []
    for step in steps:
        scores = step(ids, scores)
    return torch.softmax(scores, -1).numpy()


def seen() -> jax.Array:
    return jnp.zeros((1, V), bool).at[0, jnp.array(PROMPT)].set(True)


@pytest.mark.parametrize("name", CASES)
def test_the_distribution_is_that_of_transformers(name):
    case = CASES[name]
    found = jax.nn.softmax(processed(jnp.asarray(LOGITS), settings_of([case]), seen()), axis=-1)
    np.testing.assert_allclose(found, theirs(case), atol=1e-5)
    assert ((np.asarray(found) > 0) == (theirs(case) > 0)).all()


def test_a_row_is_drawn_alike_whatever_its_neighbours():
    case = CASES["all"]
    alone = next_tokens(jnp.asarray(LOGITS), settings_of([case]), seen(), jnp.array([4]))
    rows = settings_of([Sampling(temperature=2.0, seed=9), case, Sampling()])
    both = jnp.concatenate([jnp.asarray(LOGITS)[:, ::-1], jnp.asarray(LOGITS), jnp.asarray(LOGITS)])
    together = next_tokens(both, rows, jnp.concatenate([seen()] * 3), jnp.array([1, 4, 2]))
    assert int(together[1]) == int(alone[0])
    assert int(together[2]) == LOGITS.argmax()


def test_draws_follow_the_distribution_and_change_with_seed_and_step():
    case = Sampling(temperature=1.0, top_k=3)
    expected = theirs(case)[0]
    rows = settings_of([Sampling(temperature=1.0, top_k=3, seed=seed) for seed in range(3000)])
    shape = (3000, V)
    all_rows, none = jnp.broadcast_to(jnp.asarray(LOGITS), shape), jnp.zeros(shape, bool)
    found = next_tokens(all_rows, rows, none, jnp.zeros(3000, int))
    share = np.bincount(np.asarray(found), minlength=V) / 3000
    assert np.abs(share - expected).max() < 4 * np.sqrt(0.25 / 3000)
    other = next_tokens(all_rows, rows, none, jnp.ones(3000, int))
    assert (np.asarray(other) != np.asarray(found)).mean() > 0.2


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"top_k": -1},
     {"repetition_penalty": 0}, {"seed": -1}, {"temperature": "hot"}, {"temperature": True}],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(wrong):
    with pytest.raises(UserError, match=f"^{next(iter(wrong))} must be"):
        Sampling(**wrong)
