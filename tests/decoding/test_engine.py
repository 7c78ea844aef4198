"""Decoding gives transformers' tokens: alone, in a ragged batch, joining others, at every bucket's edge, on a mesh."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import load_tokenizer
from solar_jax.decoding import engine as engine_module
from solar_jax.decoding.engine import Answer, Engine, Request, bucket
from solar_jax.decoding.forward import Layout, cached_hidden, empty_cache, projected, with_row, written
from solar_jax.decoding.model import load_model
from solar_jax.decoding.sampling import Sampling
from solar_jax.decoding.weights import laid_out
from solar_jax.errors import UserError
from solar_jax.model.llama import logits
from tests.conftest import hf_model, save_hf

NEW = 40
KINDS = {"llama": {}, "mistral": {"sliding_window": 24}}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> pathlib.Path:
    return save_hf(hf_model(request.param, **KINDS[request.param]), tmp_path_factory.mktemp("decode") / request.param)


def prompts(count: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(1)
    lengths = [1, 15, 16, 17, 31, 32, 33, 64, 3, 50, 7, 88, 2, 41, 19, 60]
    return [tuple(rng.integers(3, 259, n).tolist()) for n in lengths][:count]


@pytest.fixture(scope="module")
def expected(folder) -> list[list[int]]:
    """transformers' greedy tokens of 16 prompts."""
    return greedy(folder, 16)


def greedy(folder: pathlib.Path, count: int) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for prompt in prompts(count):
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        out.append(made[0, len(prompt) :].tolist())
    return out


@functools.cache  # of compiled programs, too
def make(folder: pathlib.Path, rows: int, **how) -> Engine:
    c = open_checkpoint(str(folder))
    return Engine(c.cfg, load_params(c), load_tokenizer(c), ends=how.pop("ends", ()), rows=rows, **how)


def answers(engine: Engine, requests: list[Request]) -> list[Answer]:
    return [answer for _, answer in sorted(engine.answers(requests))]


def test_experts_decode_the_tokens_of_transformers_mixtral(tmp_path):
    folder = save_hf(hf_model("mixtral", num_local_experts=4, num_experts_per_tok=2), tmp_path / "mixtral")
    found = answers(make(folder, 3), [Request(prompt, NEW) for prompt in prompts(5)])
    assert [list(answer.tokens) for answer in found] == greedy(folder, 5)


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_greedy_tokens_are_transformers_in_batches_of_ragged_prompts_that_join_and_leave(folder, expected, rows):
    requests = [Request(prompt, NEW - i % 3) for i, prompt in enumerate(prompts(16))]
    found = answers(make(folder, rows), requests)
    for request, answer, wanted in zip(requests, found, expected, strict=True):
        assert list(answer.tokens) == wanted[: request.max_new_tokens]
        assert answer.finish == "length"


def test_a_stacked_cache_gives_the_tokens_of_one_held_apart(folder, expected, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine_module.jax, "default_backend", lambda: "tpu")
        engine = make.__wrapped__(folder, 3)
    found = answers(engine, [Request(prompt, 12) for prompt in prompts(6)])
    assert [list(answer.tokens) for answer in found] == [wanted[:12] for wanted in expected[:6]]


def cached(c: Checkpoint, rows: np.ndarray, layout: Layout, *, prompt: int, shift: int = 0) -> np.ndarray:
    """Logits of the tokens [B, T] after the first `prompt`, each fed behind a cache of those before it."""
    held = laid_out(load_params(c), c.cfg, jnp.float32)
    cache = empty_cache(c.cfg, len(rows), 128, jnp.float32, layout)
    run = functools.partial(cached_hidden, c.cfg, held, compute_dtype=jnp.float32, layout=layout)
    for i, row in enumerate(rows):
        _, _, new = run(jnp.asarray(row[:prompt]), jnp.arange(prompt), None)
        cache = with_row(cache, new, jnp.asarray([i]), layout)
    found = []
    for at in range(prompt, rows.shape[1]):
        positions = jnp.full(len(rows), at + shift)
        x, head, new = run(jnp.asarray(rows[:, at]), positions, cache)
        cache = written(cache, new, positions, layout)
        found.append(projected(x, head, layout))
    return np.stack(found, axis=1)


@pytest.mark.parametrize("apart", [False, True])
def test_cached_logits_are_those_without_a_cache(folder, apart):
    c = open_checkpoint(str(folder))
    rows = np.array([prompts(8)[7], prompts(8)[7][::-1]])
    whole = logits(c.cfg, load_params(c), jnp.asarray(rows))
    np.testing.assert_allclose(cached(c, rows, Layout(apart), prompt=40), whole[:, 40:], atol=1e-4)


def test_a_wrong_position_is_seen(folder):
    """A negative control of the comparison above."""
    c = open_checkpoint(str(folder))
    rows = np.array([prompts(8)[7][:44]])
    whole = logits(c.cfg, load_params(c), jnp.asarray(rows))
    assert np.abs(cached(c, rows, Layout(), prompt=40, shift=1) - whole[:, 40:]).max() > 1e-2


def test_a_model_split_over_devices_gives_the_same_tokens(folder, expected):
    model = dataclasses.replace(load_model(open_checkpoint(str(folder)), "float32"), ends=[])
    assert jax.device_count() == 8
    assert len(model.params["layers"]["q_proj"].sharding.device_set) == 8
    found = answers(model.engine(rows=4), [Request(prompt, 10) for prompt in prompts(6)])
    assert [list(answer.tokens)[:10] for answer in found] == [wanted[:10] for wanted in expected[:6]]


def test_an_answer_ends_at_an_end_token_or_a_stop_string(folder, expected):
    prompt, wanted = prompts(16)[1], expected[1]
    at = next(i for i in range(3, NEW) if wanted[i] not in wanted[:i])
    (ended,) = answers(make(folder, 2, ends=(wanted[at],)), [Request(prompt, NEW)])
    assert (list(ended.tokens), ended.finish) == (wanted[:at], "stop")
    tokenizer = load_tokenizer(open_checkpoint(str(folder)))
    text = tokenizer.decode(wanted)
    stop = text[4:6]
    (stopped,) = answers(make(folder, 2), [Request(prompt, NEW, stops=(stop,))])
    assert (stopped.text, stopped.finish) == (text[: text.index(stop)], "stop")


def test_a_cancelled_request_frees_its_row_and_leaves_others_alone(folder, expected):
    engine = make(folder, 1)
    first, second = engine.submit(Request(prompts(2)[0], NEW)), engine.submit(Request(prompts(2)[1], NEW))
    engine.step()
    engine.cancel(first)
    pieces = []
    while not engine.is_idle:
        pieces += engine.step()
    assert {piece.number for piece in pieces} == {second}
    assert list(pieces[-1].answer.tokens) == expected[1]


def test_sampled_rows_do_not_depend_on_their_neighbours(folder):
    requests = [
        Request(prompt, 12, Sampling(temperature=1.0, top_p=0.9, seed=i)) for i, prompt in enumerate(prompts(4))
    ]
    alone = [answers(make(folder, 1), [request])[0].tokens for request in requests]
    together = [answer.tokens for answer in answers(make(folder, 3), [*requests, Request(prompts(1)[0], 5)])]
    assert together[:4] == alone
    assert len(set(alone)) > 1


def test_buckets_round_up_to_few_sizes_and_to_the_context():
    assert [bucket(n, 1000) for n in (1, 16, 17, 257, 900)] == [16, 16, 32, 320, 1000]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request((), 5), "the prompt has no tokens"),
        (Request((3,) * 60, 5), "60 tokens and 5 new ones are 65, more than the context of 64"),
        (Request((3,), 0), "max_new_tokens must be at least 1, found 0"),
        (Request((5000,), 5), "the prompt has the token 5000"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_in_one_sentence(folder, request_, said):
    with pytest.raises(UserError, match=said):
        make(folder, 1, context=64).submit(request_)


def test_a_cache_that_does_not_fit_is_refused_with_the_bytes_and_what_fits(folder, monkeypatch):
    engine = make(folder, 1000)
    monkeypatch.setattr(engine_module.chips, "memory_bytes", lambda device: 40e6)
    with pytest.raises(UserError, match=r"cache of 1000 rows of 448 tokens needs [\d,]+ bytes, but [\d,]+ are left"):
        engine.submit(Request((3,) * 300, 100))
