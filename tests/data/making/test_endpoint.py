"""The client against a stub: what it retries, how long it waits, when it gives up, and what it says then."""

import itertools
import threading
import time

import pytest

from solar_jax.data.making import endpoint as endpoint_module
from solar_jax.data.making.endpoint import MOST_FAILURES, Endpoint, Unanswered
from solar_jax.data.making.prompts import rephrase_messages
from solar_jax.data.making.web import Response, api_base, check_endpoint_url
from solar_jax.errors import UserError
from tests.conftest import free_port
from tests.data.making.stub import Sent, Stub, said, serving

REQUEST = {"model": "stub", "messages": rephrase_messages("How many are 3 and 4?", 0)}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.001)


@pytest.fixture
def waits(monkeypatch):
    """The seconds of every wait, none of which is waited."""
    found = []
    begin = time.monotonic()
    monkeypatch.setattr(Endpoint, "_wait_until", lambda self, moment: found.append(moment - begin))
    return found


def answers(*sent: Sent | None):
    """An override that sends these one after another, and the last again and again."""
    left = itertools.chain(sent, itertools.repeat(sent[-1]))
    return lambda request: next(left)


def test_an_answer_is_read_with_model_and_tokens():
    with serving(Stub()) as stub:
        reply = Endpoint(stub.url, "secret").chat(REQUEST)
    assert (reply.model, reply.finish, reply.tokens_in, reply.tokens_out, reply.retries) == ("stub-1", "stop", 11, 7, 0)
    assert reply.text.endswith("How many are 3 and 4?")
    assert stub.keys == {"Bearer secret"}
    assert stub.requests == [REQUEST]


def test_half_a_surrogate_pair_becomes_a_character():
    body = said("x").body.replace(b'"x"', b'"x \\ud83d"')
    with serving(Stub(answers(Sent(200, body)))) as stub:
        assert Endpoint(stub.url).chat(REQUEST).text == "x ?"


def test_an_endpoint_that_counts_no_tokens_is_read_too():
    with serving(Stub(answers(said("x", usage=None, model=None)))) as stub:
        reply = Endpoint(stub.url).chat(REQUEST)
    assert (reply.text, reply.model, reply.tokens_in) == ("x", "stub", 0)
    assert stub.keys == {None}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/v1", "http://h:8000/v1"),
        ("http://h:8000/v1/", "http://h:8000/v1"),
        ("https://h/api/v1/chat/completions", "https://h/api/v1"),
        ("https://h/v1beta/openai", "https://h/v1beta/openai"),
        ("https://h/proxy", "https://h/proxy/v1"),
    ],
)
def test_the_api_is_found_below_any_url(url, expected):
    assert api_base(url) == expected


@pytest.mark.parametrize("url", ["h:8000", "ftp://h", "http://", "http:///v1", "http://h:x", "http://a b", "/v1"])
def test_what_is_no_url_of_an_endpoint_is_refused(url):
    with pytest.raises(UserError, match="must be a URL that begins with http:// or https:// and names a host"):
        check_endpoint_url(url)


@pytest.mark.parametrize("url", ["http://user:sesame@h/v1", "http://h/v1?key=sesame", "http://h/v1#sesame"])
def test_a_url_with_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(UserError, match="give a key by --api_key_file") as e:
        check_endpoint_url(url)
    assert "sesame" not in str(e.value)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_failures_are_tried_again(status):
    with serving(Stub(answers(Sent(status, b"busy"), Sent(status, b"busy"), None))) as stub:
        assert Endpoint(stub.url).chat(REQUEST).retries == 2
    assert len(stub.requests) == 3


def test_waits_double_with_jitter_and_the_last_try_is_not_waited_for(waits, monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 1000.0)
    monkeypatch.setattr(endpoint_module, "LONGEST_WAIT", 1e9)
    monkeypatch.setattr(endpoint_module, "LONGEST_ASKED", 1e9)
    with serving(Stub(answers(Sent(500)))) as stub, pytest.raises(Unanswered, match="answered 500 Internal"):
        Endpoint(stub.url, retries=4).chat(REQUEST)
    assert len(stub.requests) == 5
    backoffs = [seconds for seconds in waits if seconds > 100]
    assert len(backoffs) == 4
    for k, seconds in enumerate(backoffs):
        assert 490 * 2**k < seconds < 1600 * 2**k


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured_and_holds_back_every_request(status, waits):
    with serving(Stub(answers(Sent(status, headers={"Retry-After": "300"}), None))) as stub:
        client = Endpoint(stub.url)
        client.chat(REQUEST)
        before = len(waits)
        client.chat(REQUEST)  # as another thread would
    assert sum(299 < seconds < 310 for seconds in waits[:before]) == 2  # after the failure, and before the next try
    assert waits[before] > 299


def test_retry_after_may_be_a_date():
    assert Response(429, {"retry-after": "7"}, b"").retry_after == 7.0
    assert Response(429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"").retry_after == 0.0
    assert Response(429, {"Retry-After": "soon"}, b"").retry_after is None
    assert Response(429, {}, b"").retry_after is None


def test_an_endpoint_that_asks_to_come_back_much_later_ends_the_command():
    with (
        serving(Stub(answers(Sent(429, headers={"Retry-After": "86400"})))) as stub,
        pytest.raises(UserError, match="answered 429 Too Many Requests, and asks to come back in 86400 s"),
    ):
        Endpoint(stub.url).chat(REQUEST)
    assert len(stub.requests) == 1


@pytest.mark.parametrize(("status", "name"), [(401, "Unauthorized"), (403, "Forbidden"), (404, "Not Found")])
def test_what_no_other_try_would_mend_ends_the_command_at_once(status, name):
    with serving(Stub(answers(Sent(status, b'{"error": {"message": "no key sesame."}}')))) as stub:
        with pytest.raises(UserError) as e:
            Endpoint(stub.url, "sesame").chat(REQUEST)
        assert str(e.value) == f"{stub.url}/v1/chat/completions: answered {status} {name}: an error: no key ***."
    assert len(stub.requests) == 1


def test_a_redirection_is_not_followed_since_it_would_take_the_key_along():
    moved = Sent(302, headers={"Location": "http://other/"})
    with serving(Stub(answers(moved))) as stub, pytest.raises(UserError, match="answered 302 Found, to http://other/"):
        Endpoint(stub.url, "sesame").chat(REQUEST)


def test_a_refused_request_is_not_tried_again_and_too_many_in_a_row_end_the_command():
    with serving(Stub(answers(Sent(400, b'{"error": "too long"}')))) as stub:
        client = Endpoint(stub.url)
        for _ in range(MOST_FAILURES - 1):
            with pytest.raises(Unanswered, match="answered 400 Bad Request: an error: too long") as e:
                client.chat(REQUEST)
            assert e.value.refused
        with pytest.raises(UserError, match=f"{MOST_FAILURES} requests in a row failed, the last: answered 400"):
            client.chat(REQUEST)
    assert len(stub.requests) == MOST_FAILURES


def test_an_answer_ends_a_row_of_failures():
    bad = [Sent(500)] * (MOST_FAILURES - 1)
    with serving(Stub(answers(*bad, None, *bad, None))) as stub:
        client = Endpoint(stub.url, retries=0)
        for _ in range(2):
            for _ in bad:
                with pytest.raises(Unanswered):
                    client.chat(REQUEST)
            client.chat(REQUEST)


NONSENSE = [
    (b"<!DOCTYPE html><html><head><title>Sign  in</title></head></html>", "an HTML page 'Sign in'"),
    (b"data: [DONE]", "no JSON but 'data: [DONE]'"),
    (b"", "an empty answer"),
    (b"[1]", "JSON that is no object but list"),
    (b'{"object": "x", "text": 1}', "JSON without 'choices', with the keys ['object', 'text']"),
    (b'{"choices": []}', "JSON with empty 'choices'"),
    (b'{"choices": [{"text": "y"}]}', 'JSON with choices of another form: [{"text": "y"}]'),
    (b'{"choices": [{"message": {"content": [1]}}]}', "JSON with choices of another form"),
    (b'{"error": {"message": "overloaded"}}', "an error: overloaded"),
    (b'{"error": "overloaded"}', "an error: overloaded"),
    (b"\xff\xfe{", "no JSON but"),
]


@pytest.mark.parametrize(("body", "expected"), NONSENSE)
def test_nonsense_is_named_and_ends_the_command_if_it_comes_first(body, expected):
    with serving(Stub(answers(Sent(200, body)))) as stub, pytest.raises(UserError) as e:
        Endpoint(stub.url).chat(REQUEST)
    assert str(e.value).startswith(f"{stub.url}/v1: expected an answer of a chat endpoint, found {expected}")
    assert len(str(e.value).splitlines()) == 1
    assert len(stub.requests) == 1


def test_nonsense_after_an_answer_may_pass():
    with serving(Stub(answers(None, Sent(200, b"<html>"), None))) as stub:
        client = Endpoint(stub.url)
        client.chat(REQUEST)
        assert client.chat(REQUEST).retries == 1


def test_a_slow_answer_is_cut_even_if_every_byte_comes_in_time():
    slow = said("x")
    slow.drip = 0.05
    with serving(Stub(answers(slow))) as stub, pytest.raises(Unanswered, match=r"no (complete )?answer within 0.2 s"):
        Endpoint(stub.url, timeout=0.2, retries=0).chat(REQUEST)


def test_closing_ends_a_request_that_is_under_way():
    with serving(Stub(delay=30)) as stub:
        client = Endpoint(stub.url, retries=3)
        threading.Thread(target=lambda: (wait_for(stub), client.close()), daemon=True).start()
        with pytest.raises(Unanswered, match="was closed"):
            client.chat(REQUEST)
    assert len(stub.requests) == 1


def wait_for(stub: Stub) -> None:
    while not stub.requests:
        time.sleep(0.001)


def test_closing_ends_a_request_that_waits_for_its_next_try():
    with serving(Stub(answers(Sent(500)))) as stub:
        client = Endpoint(stub.url)
        client.close()
        with pytest.raises(Unanswered, match="was closed"):
            client.chat(REQUEST)
    assert stub.requests == []


def test_the_only_model_is_taken_and_of_several_one_must_be_named():
    with serving(Stub()) as stub:
        assert Endpoint(stub.url).served_model(None) == "stub"
        assert Endpoint(stub.url).served_model("other") == "other"
    for models, listed in ((("b", "a"), "2 models; name one by --model: a, b"), ((), "0 models; name one by .*: none")):
        with serving(Stub(models=models)) as stub, pytest.raises(UserError, match=f"serves {listed}"):
            Endpoint(stub.url).served_model(None)
    with serving(Stub()) as stub:
        with pytest.raises(UserError, match="/v3/models: answered 404 Not Found"):
            Endpoint(f"{stub.url}/v3").served_model(None)
        assert Endpoint(f"{stub.url}/v3").served_model("named") == "named"  # some endpoints list none


def test_an_endpoint_that_is_away_is_named():
    url = f"http://127.0.0.1:{free_port()}"
    for model in (None, "named"):
        with pytest.raises(UserError) as e:
            Endpoint(url).served_model(model)
        assert str(e.value) == f"{url}/v1: cannot be reached: Connection refused."


def test_a_proxy_is_used_for_other_hosts_but_not_for_this_one(monkeypatch):
    with serving(Stub()) as stub:
        monkeypatch.setenv("http_proxy", stub.url)
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(UserError, match="answered 404"):  # the stub is asked for http://..., which it does not know
            Endpoint("http://models.invalid").served_model(None)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
        assert Endpoint(stub.url).served_model(None) == "stub"
