"""Many clients at once get what each gets alone, and those who leave take nothing with them."""

import asyncio
import gc
import json
import socket
import threading

import numpy as np
import openai
import pytest

from solar_jax.decoding.model import Loaded
from solar_jax.serving.streams import AnswerStream
from solar_jax.serving.worker import Job
from tests.serving.servers import load_alone, running, save_writer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(load_alone(save_writer(tmp_path_factory.mktemp("load") / "model")), rows=8, context=1024) as found:
        yield found


def requests(count: int) -> list[dict]:
    """Prompts and answers of unlike lengths, greedy and drawn, half of them streamed."""
    rng = np.random.default_rng(4)
    return [
        {
            "prompt": rng.integers(3, 259, int(rng.integers(1, 33))).tolist(),
            "max_tokens": int(rng.integers(1, 25)),
            "temperature": float(i % 3 > 0),
            "seed": i,
            "stream": i % 2 == 0,
        }
        for i in range(count)
    ]


async def ask(client, request: dict) -> tuple[str, str]:
    found = await client.completions.create(model="tiny", **request)
    if not request["stream"]:
        return found.choices[0].text, found.choices[0].finish_reason
    text, finish = "", ""
    async for chunk in found:
        text += chunk.choices[0].text
        finish = chunk.choices[0].finish_reason or finish
    return text, finish


def test_64_requests_at_once_get_what_each_gets_alone(server):
    async def both():
        async with server.async_client() as client:
            together = await asyncio.gather(*(ask(client, request) for request in requests(64)))
            return together, [await ask(client, request | {"stream": False}) for request in requests(64)]

    together, alone = asyncio.run(both())
    assert together == alone
    assert len(set(together)) > 50
    server.wait_until_idle()


def leave(server, *, stream: bool, pieces: int) -> None:
    """Asks for a long answer and closes the connection in the middle of it."""
    port = int(server.url.split(":")[2].split("/")[0])
    body = json.dumps({"prompt": "x", "max_tokens": 1000, "temperature": 0, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        received = b""
        while stream and received.count(b"data: ") < pieces:
            part = raw.recv(4096)
            assert part, received  # the server ended the connection
            received += part


def test_200_clients_that_leave_in_the_middle_give_back_rows_threads_and_memory(server, monkeypatch):
    client, engine, completed = server.client(), server.service.engine, []
    wanted = client.completions.create(model="tiny", prompt="after", max_tokens=20, temperature=0).choices[0].text
    real = engine.step

    def step():
        pieces = real()
        completed.extend(piece for piece in pieces if piece.answer is not None)
        return pieces

    def kept() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), sum(isinstance(one, Job | AnswerStream) for one in gc.get_objects())

    def crowd(count: int) -> None:
        threads = [
            threading.Thread(target=leave, args=(server,), kwargs={"stream": i % 4 > 0, "pieces": 1 + i % 3})
            for i in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.wait_until_idle()
        assert completed == []  # nothing was generated to its end for nobody

    monkeypatch.setattr(engine, "step", step)
    crowd(40)  # threads of the pool are made once
    before = kept()
    for _ in range(4):
        crowd(40)
    after = kept()
    assert after[0] <= before[0]
    assert after[1] == 0
    assert len(engine._free) == 8
    found = client.completions.create(model="tiny", prompt="after", max_tokens=20, temperature=0)
    assert found.choices[0].text == wanted


def test_others_are_answered_while_a_long_prompt_is_tokenised(server, monkeypatch):
    client, inside, done = server.client(timeout=60), threading.Event(), threading.Event()
    real = Loaded.encoding

    def encoding(model, text, **how):
        inside.set()
        try:
            return real(model, text, **how)
        finally:
            inside.clear()

    def long() -> None:
        with pytest.raises(openai.BadRequestError, match="more than the context of 1024"):
            client.completions.create(model="tiny", prompt="word " * 400_000, max_tokens=3)
        done.set()

    monkeypatch.setattr(Loaded, "encoding", encoding)
    thread = threading.Thread(target=long)
    thread.start()
    answered = 0
    while not done.is_set():
        begun_inside = inside.is_set()
        client.models.list()
        answered += begun_inside and inside.is_set()
    thread.join()
    assert answered > 3
