"""The web server around the application: its address, and how it ends."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn

from solar_jax.serving.app import Gate
from solar_jax.serving.worker import Worker

_LAST = 5  # seconds in which connections have to end once all answers have
_LOOK = 0.05  # seconds between looks at what is under way


class _Server(uvicorn.Server):
    """uvicorn, without its own handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_server(gate: Gate, worker: Worker, sock: socket.socket, *, grace: float) -> None:
    """Serves until SIGTERM or SIGINT; then running answers may go on for `grace` seconds, or until a second signal."""
    asyncio.run(_serve(gate, worker, sock, grace))


async def _serve(gate: Gate, worker: Worker, sock: socket.socket, grace: float) -> None:
    config = uvicorn.Config(
        gate, log_level="warning", access_log=False, lifespan="off", server_header=False, timeout_keep_alive=75,
        timeout_graceful_shutdown=_LAST,
    )  # fmt: skip
    server = _Server(config)
    first, second = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (second if first.is_set() else first).set())
    serving, ending = asyncio.create_task(server.serve(sockets=[sock])), asyncio.create_task(first.wait())
    await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    worker.close()  # what is new is refused from here on
    until = loop.time() + grace
    while gate.under_way and not second.is_set() and loop.time() < until and not serving.done():
        await asyncio.sleep(_LOOK)
    await asyncio.to_thread(worker.stop)
    server.should_exit = True
    await serving
