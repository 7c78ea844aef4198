"""Shared by tests of the endpoint: a tiny model that writes letters, and a server of it in a thread."""

import asyncio
import contextlib
import dataclasses
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import torch
import uvicorn

from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import end_ids, load_tokenizer
from solar_jax.decoding.model import Loaded
from solar_jax.serving.address import bind_address, open_to_clients
from solar_jax.serving.app import Gate, Service, make_app
from solar_jax.serving.token_bytes import TokenBytes
from solar_jax.serving.worker import STARTING, Worker
from tests.conftest import byte_tokenizer, hf_model, save_hf

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}"
)


def save_writer(folder: pathlib.Path, *, template: bool = True, **changes: Any) -> pathlib.Path:
    """Saves a model whose answers are almost always letters, so that texts can be cut anywhere."""
    model = hf_model(**({"num_hidden_layers": 2} | changes))
    tokens = byte_tokenizer().get_vocab()
    letters = [tokens[c] for c in "abcdefghijklmnopqrstuvwxyz"]
    others = [i for i in range(model.config.vocab_size) if i not in letters]
    with torch.no_grad():
        model.get_output_embeddings().weight[others] *= 1e-3
        model.get_output_embeddings().weight[letters] *= 3
    save_hf(model, folder)
    if template:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that runs."""

    url: str  # with /v1
    service: Service
    gate: Gate

    def client(self, **how: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=how.pop("api_key", "none"), max_retries=0, **how)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url, api_key="none", max_retries=0)

    def wait_until_idle(self, seconds: float = 5.0) -> None:
        """Waits until no answer runs or waits; fails if that takes too long."""
        until = time.monotonic() + seconds
        while any(self.service.worker.counts.values()) or self.gate.under_way:
            assert time.monotonic() < until, (self.service.worker.counts, self.gate.under_way)
            time.sleep(0.01)


def load_alone(folder: pathlib.Path) -> Loaded:
    """The model on one device, which is faster than eight."""
    c = open_checkpoint(str(folder))
    return Loaded(c.cfg, load_params(c), "float32", load_tokenizer(c), end_ids(c), c.companions, c.where)


@contextlib.contextmanager
def running(
    model: Loaded, *, rows: int = 8, queue: int = 64, context: int = 0, keys: tuple[bytes, ...] = ()
) -> Iterator[Running]:
    """Serves a model on a port of its own."""
    engine = model.engine(rows=rows, context=context)
    worker = Worker(engine, rows=rows, most_waiting=queue)
    service = Service("tiny", model, engine, worker, TokenBytes(model.tokenizer))
    gate = make_app(service, keys)
    sock = bind_address("127.0.0.1", 0, has_keys=bool(keys))
    open_to_clients(sock)
    server = uvicorn.Server(uvicorn.Config(gate, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
    worker.start(warm_up=False)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
    thread.start()
    while worker.state == STARTING or not server.started:
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}/v1", service, gate)
    finally:
        worker.stop()
        server.should_exit = True
        thread.join()
