"""OpenAI's client reads what the engine says: texts, choices, streams, log-probabilities, counts."""

import jax
import numpy as np
import pytest

from solar_jax.decoding.engine import Request
from solar_jax.decoding.sampling import Sampling
from solar_jax.model.llama import logits
from tests.serving.servers import load_alone, running, save_writer

PROMPT = "Once upon"
GREEDY = Sampling()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(load_alone(save_writer(tmp_path_factory.mktemp("answers") / "model")), rows=4) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def alone(server):
    """The engine's own answers, of another engine than the server's."""
    model = server.service.model
    engine = model.engine(rows=4)

    def answer(prompt: str | list[int], new: int, sampling: Sampling = GREEDY):
        tokens = model.encode(prompt) if isinstance(prompt, str) else prompt
        ((_, found),) = engine.answers([Request(tuple(tokens), new, sampling)])
        return found

    return answer


def greedy(client, prompt, **how):
    return client.completions.create(model="tiny", prompt=prompt, **({"temperature": 0, "max_tokens": 12} | how))


def test_a_completion_is_the_engines_answer_with_its_tokens_counted(client, alone):
    found, wanted = greedy(client, PROMPT), alone(PROMPT, 12)
    assert len(wanted.text) == 12
    assert (found.choices[0].text, found.choices[0].finish_reason) == (wanted.text, wanted.finish)
    assert found.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(PROMPT), "completion_tokens": 12, "total_tokens": len(PROMPT) + 12,
    }  # fmt: skip
    assert (found.object, found.model, found.choices[0].logprobs) == ("text_completion", "tiny", None)


def test_all_settings_of_the_draw_reach_the_engine(client, alone):
    sampling = Sampling(temperature=0.9, top_k=9, top_p=0.95, min_p=0.01, repetition_penalty=1.3, seed=11)
    extra = {"top_k": 9, "min_p": 0.01, "repetition_penalty": 1.3}
    found = greedy(client, PROMPT, temperature=0.9, top_p=0.95, seed=11, extra_body=extra)
    assert found.choices[0].text == alone(PROMPT, 12, sampling).text != alone(PROMPT, 12).text


def test_choices_come_in_the_order_of_prompts_and_then_of_n(client, alone):
    prompts = ["one", [70, 71, 72, 73], "three and more"]
    for given in (prompts[::2], [prompts[1], [80, 81]]):  # texts, and tokens
        found = greedy(client, given, n=2, temperature=1.0, seed=5)
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        wanted = [alone(p, 12, Sampling(temperature=1.0, seed=5 + i)).text for p in given for i in range(2)]
        assert [choice.text for choice in found.choices] == wanted
        assert len(set(wanted)) == 4


def test_answers_without_a_seed_differ_from_each_other_even_to_one_prompt(client):
    found = greedy(client, [PROMPT, PROMPT], n=2, temperature=1.0)
    assert len({choice.text for choice in found.choices}) == 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", [{}, {"logprobs": 3}, {"echo": True}, {"echo": True, "logprobs": 0}])
def test_the_chunks_of_a_stream_are_the_whole_answer(client, stream, how):
    if not stream:
        assert greedy(client, PROMPT, **how).choices[0].text.startswith(PROMPT) == ("echo" in how)
        return
    whole = greedy(client, [PROMPT, "x"], n=2, seed=3, temperature=0.8, **how)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = greedy(client, [PROMPT, "x"], n=2, seed=3, temperature=0.8, **options, **how)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in chunks)
    for wanted in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == wanted.index]
        assert "".join(choice.text for choice in mine) == wanted.text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [wanted.finish_reason]
        scored = [c.logprobs for c in mine if c.logprobs]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs") if wanted.logprobs else ():
            joined = [item for logprobs in scored for item in getattr(logprobs, name)]
            if name in ("tokens", "text_offset"):
                assert joined == getattr(wanted.logprobs, name)
            elif name == "token_logprobs":
                assert joined == pytest.approx(getattr(wanted.logprobs, name), abs=1e-4)


def test_log_probabilities_are_those_of_the_model_and_of_the_prompt_if_echoed(server, client):
    found = greedy(client, PROMPT, logprobs=2, echo=True).choices[0]
    tokens = server.service.model.encode(found.text)
    # Of the engine's parameters, since the service keeps none beside them.
    model = server.service.model
    wanted = np.asarray(jax.nn.log_softmax(logits(model.cfg, model.params, np.asarray([tokens]))[0]))
    scores = found.logprobs
    assert "".join(scores.tokens) == found.text
    assert scores.text_offset == list(range(len(found.text)))
    assert scores.token_logprobs[0] is None
    assert scores.top_logprobs[0] is None
    own = wanted[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(scores.token_logprobs[1:], own, atol=1e-4)
    for i, top in enumerate(scores.top_logprobs[1:]):
        assert max(top.values()) == pytest.approx(wanted[i].max(), abs=1e-4)
        assert top[scores.tokens[i + 1]] == scores.token_logprobs[i + 1]
        assert len(top) in (2, 3)
    generated = slice(len(PROMPT), None)
    assert scores.token_logprobs[generated] == [max(top.values()) for top in scores.top_logprobs[generated]]


def test_an_echo_without_new_tokens_gives_the_prompts_log_probabilities(client):
    one = greedy(client, PROMPT, logprobs=1, echo=True, max_tokens=1)
    none = greedy(client, PROMPT, logprobs=1, echo=True, max_tokens=0)
    assert len(one.choices[0].logprobs.tokens) == len(PROMPT) + 1
    assert none.choices[0].logprobs.token_logprobs == one.choices[0].logprobs.token_logprobs[:-1]
    assert (none.choices[0].text, none.choices[0].finish_reason) == (PROMPT, "length")
    assert none.usage.completion_tokens == 0
    assert greedy(client, PROMPT, echo=True, max_tokens=0).choices[0].text == PROMPT


def test_a_stop_string_cuts_text_and_log_probabilities_alike(client):
    drawn = {"max_tokens": 40, "logprobs": 1, "temperature": 1.0, "seed": 2, "extra_body": {"top_k": 8}}
    whole = greedy(client, PROMPT, **drawn).choices[0]
    assert whole.text.isalpha()
    at = next(i for i in range(6, 40) if whole.text.index(whole.text[i : i + 2]) == i)
    stop = whole.text[at : at + 2]
    for stream in (False, True):
        found = greedy(client, PROMPT, stop=["never", stop], stream=stream, **drawn)
        parts = [chunk.choices[0] for chunk in found] if stream else [found.choices[0]]
        assert "".join(part.text for part in parts) == whole.text[:at]
        assert parts[-1].finish_reason == "stop"
        scored = [part.logprobs for part in parts if part.logprobs]
        assert [t for one in scored for t in one.tokens] == whole.logprobs.tokens[:at]
        assert [p for one in scored for p in one.token_logprobs] == whole.logprobs.token_logprobs[:at]


MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
WRITTEN = "[system] be brief\n[user] hello\n> "


def chat(client, messages=MESSAGES, **how):
    return client.chat.completions.create(
        model="tiny", messages=messages, **({"temperature": 0, "max_completion_tokens": 8} | how)
    )


def test_a_chat_is_written_by_the_models_template(client, alone):
    wanted = alone(WRITTEN, 8).text
    parts = [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, MESSAGES[1]]
    for messages in (MESSAGES, parts):
        found = chat(client, messages)
        assert found.choices[0].message.content == wanted
        assert (found.choices[0].message.role, found.usage.prompt_tokens) == ("assistant", len(WRITTEN))
    assert chat(client, max_tokens=3, max_completion_tokens=5).usage.completion_tokens == 5
    assert client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=3
    ).choices[0].message.content == wanted[:3]  # fmt: skip


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(client):
    long = [{"role": "user", "content": "x" * 1000}]
    found = client.chat.completions.create(model="tiny", messages=long, temperature=0)
    assert found.usage.total_tokens == 1024
    assert found.choices[0].finish_reason == "length"


def test_a_streamed_chat_begins_with_its_role_and_is_the_whole_answer(client):
    whole = chat(client, n=2, logprobs=True, top_logprobs=2, temperature=1.0, seed=1)
    chunks = list(chat(client, n=2, logprobs=True, top_logprobs=2, temperature=1.0, seed=1, stream=True))
    for wanted in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == wanted.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == wanted.message.content
        assert mine[-1].finish_reason == wanted.finish_reason
        scored = [one for c in mine if c.logprobs for one in c.logprobs.content]
        assert [one.token for one in scored] == [one.token for one in wanted.logprobs.content]
        assert "".join(one.token for one in scored) == wanted.message.content
        assert bytes(b for one in scored for b in one.bytes).decode(errors="replace") == wanted.message.content
        assert all(len(one.top_logprobs) == 2 for one in scored)


def test_the_model_is_listed_and_found_by_name(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "solar_jax"
