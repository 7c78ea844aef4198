"""Log-probabilities of prompts and answers are those of the model without a cache, token by token."""

import jax
import numpy as np
import pytest

from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import load_tokenizer
from solar_jax.decoding.engine import Engine, NewText, Request
from solar_jax.decoding.logprobs import MOST_TOP, LogProbs
from solar_jax.decoding.sampling import Sampling
from solar_jax.errors import UserError
from solar_jax.model.llama import logits

LENGTHS = [2, 16, 17, 63, 64, 65, 66, 130]  # around the edges of a part and of a prompt's buckets


@pytest.fixture(scope="module")
def model(tiny):
    c = open_checkpoint(str(tiny))
    return c.cfg, load_params(c), load_tokenizer(c)


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    cfg, params, tokenizer = model
    return Engine(cfg, params, tokenizer, ends=(), rows=3)


def prompt(length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(length).integers(3, 259, length).tolist())


def expected(model, tokens) -> np.ndarray:
    """Log-probabilities [T, V], in place i of what follows token i."""
    cfg, params, _ = model
    return np.asarray(jax.nn.log_softmax(logits(cfg, params, np.asarray([tokens]))[0]))


def pieces(engine: Engine, *requests: Request) -> list[list[NewText]]:
    numbers = [engine.submit(request) for request in requests]
    out = {number: [] for number in numbers}
    while not engine.is_idle:
        for piece in engine.step():
            out[piece.number].append(piece)
    return [out[number] for number in numbers]


def of_prompt(found: list[NewText]) -> LogProbs:
    (first,) = [piece.prompt for piece in found if piece.prompt is not None]
    return first


def test_a_prompts_log_probabilities_are_the_models_at_every_edge(model, engine):
    asked = [Request(prompt(n), i % 2, prompt_log_probs=True) for i, n in enumerate(LENGTHS)]
    for request, found in zip(asked, pieces(engine, *asked), strict=True):
        tokens, scores = request.tokens, of_prompt(found)
        wanted = expected(model, tokens)[:-1]
        np.testing.assert_allclose(scores.chosen, wanted[np.arange(len(wanted)), tokens[1:]], atol=1e-4)
        np.testing.assert_allclose(scores.top, -np.sort(-wanted, axis=-1)[:, :MOST_TOP], atol=1e-4)
        np.testing.assert_allclose(np.take_along_axis(wanted, scores.ids, -1), scores.top, atol=1e-4)
        assert found[-1].answer.made == request.max_new_tokens


def test_the_token_of_a_place_has_the_very_number_that_it_has_among_the_top_ones(engine):
    (found,) = pieces(engine, Request(prompt(130), 0, prompt_log_probs=True))
    scores = of_prompt(found)
    among = scores.ids == np.asarray(prompt(130)[1:])[:, None]
    assert among.any()
    at, place = np.nonzero(among)
    np.testing.assert_array_equal(scores.top[at, place], scores.chosen[at])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.3, top_k=50, repetition_penalty=1.2, seed=3)])
def test_an_answers_log_probabilities_are_the_models_before_what_shapes_the_draw(model, engine, sampling):
    asked = [Request(prompt(n), 9, sampling, log_probs=True) for n in (5, 16, 40)]
    for request, found in zip(asked, pieces(engine, *asked), strict=True):
        tokens = found[-1].answer.tokens
        scores = [one for piece in found for one in piece.log_probs]
        assert [one.token for one in scores] == list(tokens)
        wanted = expected(model, request.tokens + tokens)[len(request.tokens) - 1 : -1]
        np.testing.assert_allclose([one.log_prob for one in scores], wanted[np.arange(9), list(tokens)], atol=1e-4)
        for one, row in zip(scores, wanted, strict=True):
            np.testing.assert_allclose([p for _, p in one.top], -np.sort(-row)[:MOST_TOP], atol=1e-4)


def test_asking_for_log_probabilities_changes_no_token_of_anyone(engine):
    sampling = Sampling(temperature=1.0, seed=1)
    asked = [Request(prompt(n), 12, sampling) for n in (5, 17, 30)]
    plain = [found[-1].answer.tokens for found in pieces(engine, *asked)]
    mixed = [asked[0], Request(prompt(17), 12, sampling, log_probs=True, prompt_log_probs=True), asked[2]]
    found = pieces(engine, *mixed)
    assert [one[-1].answer.tokens for one in found] == plain
    assert all(piece.prompt is None and not piece.log_probs for one in (found[0], found[2]) for piece in one)


def test_a_stop_string_cuts_the_log_probabilities_where_it_cuts_the_text(engine):
    (whole,) = pieces(engine, Request(prompt(20), 40, log_probs=True))
    text = whole[-1].answer.text
    at = next(i for i in range(5, len(text)) if text[i].isascii() and text.index(text[i]) == i)
    (found,) = pieces(engine, Request(prompt(20), 40, log_probs=True, stops=(text[at],)))
    answer, scores = found[-1].answer, [one for piece in found for one in piece.log_probs]
    assert answer.text == text[:at]
    assert answer.finish == "stop"
    assert max(one.offset for one in scores) < at
    assert [one.token for one in scores] == list(answer.tokens[: len(scores)])
    assert len(answer.tokens) > len(scores)


def test_a_token_is_given_with_the_piece_that_holds_its_text(engine):
    (found,) = pieces(engine, Request(prompt(20), 30, log_probs=True, stops=("\x00never",)))
    length = 0
    for piece in found:
        length += len(piece.text)
        if piece.answer is None:
            assert all(one.offset < length for one in piece.log_probs)


def test_the_end_token_is_counted_and_has_its_log_probability(model, engine):
    cfg, params, tokenizer = model
    ((*_, last),) = pieces(engine, Request(prompt(5), 1))
    (end,) = last.answer.tokens
    ((found,),) = pieces(Engine(cfg, params, tokenizer, ends=(end,)), Request(prompt(5), 9, log_probs=True))
    assert (found.answer.tokens, found.answer.finish, found.answer.made) == ((), "stop", 1)
    assert [one.token for one in found.log_probs] == [end]


def test_a_prompt_of_the_whole_context_is_read_and_nothing_is_generated(model):
    cfg, params, tokenizer = model
    engine = Engine(cfg, params, tokenizer, ends=(), context=100)
    (found,) = pieces(engine, Request(prompt(100), 0, prompt_log_probs=True))
    assert len(of_prompt(found).chosen) == 99
    assert found[-1].answer.text == ""
    with pytest.raises(UserError, match="100 tokens and 1 new ones are 101"):
        engine.submit(Request(prompt(100), 1, prompt_log_probs=True))
    with pytest.raises(UserError, match="max_new_tokens must be at least 0, found -1"):
        engine.submit(Request(prompt(5), -1, prompt_log_probs=True))
