"""The answers to one call as they come from the engine's thread into the event loop, while the client stays."""

import asyncio
import functools
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from starlette.types import Receive

from solar_jax.decoding.engine import NewText, Request
from solar_jax.serving.worker import Job, Worker


class AnswerStream:
    """A call's answers on their way; leaving the context drops what is not complete."""

    def __init__(self, worker: Worker, requests: Sequence[Request]):
        """Queues the requests.

        Raises:
          ApiError: nothing more is taken.
        """
        self._loop, self._worker = asyncio.get_running_loop(), worker
        self._inbox: asyncio.Queue[tuple[int, NewText | Exception]] = asyncio.Queue()
        self._jobs = [Job(request, functools.partial(self._from_thread, i)) for i, request in enumerate(requests)]
        worker.submit(self._jobs)

    def _from_thread(self, index: int, item: NewText | Exception) -> None:
        self._loop.call_soon_threadsafe(self._inbox.put_nowait, (index, item))

    async def pieces(self) -> AsyncIterator[tuple[int, NewText]]:
        """Yields each choice's number with what is new, until all are complete.

        Raises:
          ApiError: they cannot be completed.
        """
        left = len(self._jobs)
        while left:
            index, item = await self._inbox.get()
            if isinstance(item, Exception):
                raise item
            yield index, item
            left -= item.answer is not None

    def close(self) -> None:
        """Drops the answers that are not complete."""
        self._worker.leave(self._jobs)


class ClientGone(Exception):
    """Raised when the client leaves before its answer is complete."""


async def while_connected[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Awaits some work, given up when the client leaves.

    Args:
      receive: of the connection, after the body.
      work: what the client waits for.

    Raises:
      ClientGone: the client left first.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
