"""Every mistake has its status and OpenAI's error object, and none of them stops the server."""

import json
import socket
import threading
import time

import httpx
import openai
import pytest

from solar_jax.serving import app
from tests.serving.servers import load_alone, running, save_writer

KEY = b"a-key"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_alone(save_writer(tmp_path_factory.mktemp("errors") / "model"))


@pytest.fixture(scope="module")
def server(model):
    with running(model, rows=2, context=64) as found:
        yield found


@pytest.fixture(scope="module")
def web(server):
    with httpx.Client(base_url=server.url.removesuffix("/v1"), trust_env=False, timeout=60) as client:
        yield client


def error(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    (found,) = response.json().values()
    assert found.keys() == {"message", "type", "param", "code"}
    assert len(found["message"].splitlines()) == 1
    assert "Traceback" not in response.text
    return found


USER = {"role": "user", "content": "x"}
CHAT = [
    ({"messages": []}, "messages", "at least one message, found []"),
    ({}, "messages", "at least one message, found null"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", 'user, assistant, found "wizard"'),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "must be one of"),
    ({"messages": ["x"]}, "messages[0]", "an object with a role and content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "a text or a list of text parts, found null"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "made of parts"),
    ({"messages": [USER | {"tool_calls": [{}]}]}, "messages[0].tool_calls", "not supported"),
    ({"messages": [USER], "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20, found 21"),
    ({"messages": [USER], "logprobs": 1}, "logprobs", "true or false, found 1"),
    ({"messages": [USER], "max_completion_tokens": -1}, "max_completion_tokens", "found -1"),
    ({"messages": [USER], "tools": [{"type": "function"}]}, "tools", "tools is not supported"),
    ({"messages": [USER], "response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"messages": [{"role": "user", "content": "x" * 80}]}, "messages", "leave none for an answer"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "half of a surrogate pair"),
]  # fmt: skip
COMPLETIONS = [
    ({}, "prompt", "found null"),
    ({"prompt": []}, "prompt", "found []"),
    ({"prompt": ["a", 1]}, "prompt", "a text, a list of tokens, or"),
    ({"prompt": [[1], [-1]]}, "prompt", "not negative"),
    ({"prompt": [True]}, "prompt", "a text, a list of tokens, or"),
    ({"prompt": [[]]}, "prompt", "the prompt has no tokens"),
    ({"prompt": ""}, "prompt", "the prompt has no tokens"),
    ({"prompt": [5000]}, "prompt", "has the token 5000, but the model has 320"),
    ({"prompt": [2**31 - 1]}, "prompt", "has the token 2147483647"),
    ({"prompt": "x" * 60}, "prompt", "60 tokens and 16 new ones are 76, more than the context of 64"),
    ({"prompt": "x", "max_tokens": -5}, "max_tokens", "from 0 to 2147483647, found -5"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", "at least 1 where echo is not set"),
    ({"prompt": "x", "max_tokens": "5"}, "max_tokens", 'found "5"'),
    ({"prompt": "x", "max_tokens": 1.5}, "max_tokens", "found 1.5"),
    ({"prompt": "x", "n": 0}, "n", "from 1 to 128, found 0"),
    ({"prompt": "x", "n": 129}, "n", "found 129"),
    ({"prompt": "x", "n": True}, "n", "found true"),
    ({"prompt": ["x"] * 17, "n": 128}, "n", "17 prompts of n=128 are 2176, above 2048"),
    ({"prompt": "x", "n": 2, "best_of": 3}, "best_of", "not supported"),
    ({"prompt": "x", "stop": 5}, "stop", "stop must be a string or a list"),
    ({"prompt": "x", "stop": ["a", ""]}, "stop", "not empty"),
    ({"prompt": "x", "logprobs": True}, "logprobs", "found true"),
    ({"prompt": "x", "logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"prompt": "x", "temperature": "hot"}, "temperature", 'found "hot"'),
    ({"prompt": "x", "temperature": -1}, "temperature", "found -1"),
    ({"prompt": "x", "temperature": 10**400}, "temperature", "a number from 0 to 100"),
    ({"prompt": "x", "top_p": 0}, "top_p", "found 0"),
    ({"prompt": "x", "top_k": 1.5}, "top_k", "found 1.5"),
    ({"prompt": "x", "seed": 2**63}, "seed", "an integer"),
    ({"prompt": "x", "stream": 1}, "stream", "true or false"),
    ({"prompt": "x", "stream_options": {}}, "stream_options", "needs stream"),
    ({"prompt": "x", "suffix": "y"}, "suffix", "suffix is not supported"),
    ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"prompt": "x", "presence_penalty": 0.5}, "presence_penalty", "not supported"),
    ({"prompt": "x", "frequency_penalty": -0.5}, "frequency_penalty", "not supported"),
    ({"prompt": "x", "guided_json": {}}, "guided_json", "not supported"),
    ({"prompt": "x", "model": 5}, "model", "a name, found 5"),
]


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [("/v1/chat/completions", *case) for case in CHAT] + [("/v1/completions", *case) for case in COMPLETIONS],
)
def test_a_field_that_cannot_be_is_named_with_what_was_found(web, path, body, param, said):
    found = error(web.post(path, content=json.dumps(body)), 400)
    assert found["param"] == param
    assert said in found["message"]
    assert found["type"] == "invalid_request_error"


NO_OBJECTS = [b"", b"{", b"[]", b"5", b"\xff", b'{"prompt": "x"', b"[" * 100_000, b'{"n": 1' + b"0" * 5000]


@pytest.mark.parametrize("body", NO_OBJECTS, ids=range(len(NO_OBJECTS)))
def test_a_body_that_is_no_json_object_is_refused(web, body):
    assert "the body must be" in error(web.post("/v1/completions", content=body), 400)["message"]


def test_a_body_without_end_is_refused(web, monkeypatch):
    monkeypatch.setattr(app, "_MOST_BYTES", 1000)
    assert error(web.post("/v1/completions", content=b" " * 1001), 413)["code"] == "body_too_large"


def test_fields_that_change_nothing_are_ignored(web):
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "unheard_of": 1, "tools": [], "logit_bias": {},
        "response_format": {"type": "text"}, "presence_penalty": 0.0, "suffix": None, "best_of": 1, "n": None,
    }  # fmt: skip
    response = web.post("/v1/completions", json={"prompt": "x", "max_tokens": 2} | harmless)
    assert response.status_code == 200, response.text


def test_what_is_not_there_has_404_and_the_wrong_method_405(web):
    assert error(web.post("/v1/completions", json={"prompt": "x", "model": "gpt-9"}), 404)["code"] == "model_not_found"
    assert error(web.get("/v1/models/gpt-9"), 404)["param"] == "model"
    assert error(web.get("/v1/nothing"), 404)["code"] == "unknown_path"
    response = web.get("/v1/completions")
    assert error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_openais_client_raises_its_own_errors(server):
    with pytest.raises(openai.BadRequestError, match="n must be an integer from 1 to 128"):
        server.client().completions.create(model="tiny", prompt="x", n=500)
    with pytest.raises(openai.NotFoundError):
        server.client().completions.create(model="other", prompt="x")


def test_a_model_without_a_template_refuses_chats_alone(tmp_path):
    model = load_alone(save_writer(tmp_path / "model", template=False))
    with running(model, rows=1) as server, httpx.Client(base_url=server.url, trust_env=False, timeout=60) as web:
        found = error(web.post("/chat/completions", json={"messages": [USER]}), 400)
        assert "no chat template" in found["message"]
        assert web.post("/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_server_with_keys_asks_for_one_everywhere_but_at_health(model):
    with running(model, rows=1, keys=(b"other", KEY)) as server:
        with httpx.Client(base_url=server.url.removesuffix("/v1"), trust_env=False, timeout=60) as web:
            assert web.get("/health").json()["status"] == "ready"
            for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY.decode()}"}):
                for path in ("/v1/models", "/v1/nothing"):
                    found = error(web.get(path, headers=given), 401)
                    assert (found["type"], found["code"]) == ("authentication_error", "invalid_api_key")
            assert web.get("/v1/models", headers={"Authorization": f"Bearer {KEY.decode()}"}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()


def test_beyond_the_queue_clients_are_sent_away_for_a_second(model):
    with running(model, rows=1, queue=2) as server:
        client, held, ended = server.client(), [], []

        def ask() -> None:
            try:
                client.completions.create(model="tiny", prompt="x", max_tokens=1000, temperature=0)
            except openai.InternalServerError as e:
                ended.append(e.status_code)

        for _ in range(3):  # one runs, two wait
            held.append(threading.Thread(target=ask))
            held[-1].start()
            wait_for(lambda: sum(server.service.worker.counts.values()) == len(held))
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="tiny", prompt="x")
        assert refused.value.response.headers["Retry-After"] == "1"
        assert refused.value.code == "queue_full"
        server.service.worker.stop()
        for thread in held:
            thread.join(10)
        assert ended == [503, 503, 503]  # a server that ends refuses what is not complete


def wait_for(true, seconds: float = 5.0):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_failure_of_the_engine_answers_everyone_and_shows_at_health(model, capfd):
    with running(model, rows=1) as server:
        client, real = server.client(timeout=5), server.service.engine.step
        stream = client.completions.create(model="tiny", prompt="x", max_tokens=900, temperature=0, stream=True)
        next(stream)
        found: list[BaseException] = []

        def ask() -> None:
            try:
                client.completions.create(model="tiny", prompt="x")
            except openai.APIError as e:
                found.append(e)

        waiting = [threading.Thread(target=ask) for _ in range(3)]
        for thread in waiting:
            thread.start()
        wait_for(lambda: server.service.worker.counts["waiting"] == 3)

        def breaks():
            real()
            raise RuntimeError("a secret of the engine")

        server.service.engine.step = breaks
        with pytest.raises(openai.APIError, match="the model failed"):
            list(stream)
        for thread in waiting:
            thread.join(10)
        assert [getattr(e, "status_code", None) for e in found] == [500, 500, 500]
        with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as web:
            assert "secret" not in str(error(web.post("/completions", json={"prompt": "x"}), 500))
            health = web.get("/../health")
            assert health.status_code == 503
            assert health.json()["status"] == "failed"
    assert "a secret of the engine" in capfd.readouterr().err


def test_a_bug_in_a_route_is_500_without_its_traceback_and_the_connection_goes_on(web, monkeypatch, capfd):
    for _ in range(20):
        with monkeypatch.context() as patch:
            patch.setattr(app, "prepare_call", lambda *_: 1 / 0)
            response = web.post("/v1/completions", json={"prompt": "x"})
        assert error(response, 500)["code"] == "internal_error"
        assert "division" not in response.text
        assert web.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert "division" in capfd.readouterr().err


def test_a_connection_that_sends_rubbish_or_half_a_body_harms_nobody(server, web):
    host, port = "127.0.0.1", int(server.url.split(":")[2].split("/")[0])
    for sent in (b"\x00\x01\x02\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"):
        with socket.create_connection((host, port)) as raw:
            raw.sendall(sent)
    assert web.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    server.wait_until_idle()
