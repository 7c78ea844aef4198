"""Makes the next step's batch in a thread while the devices compute the current step."""

import concurrent.futures
from collections.abc import Callable
from types import TracebackType

from solar_jax.data.pipeline import Batch


class Prefetcher:
    """Makes the batches of steps `first`, `first + 1`, ... `last - 1` one ahead; `take` raises errors of `make`."""

    def __init__(self, make: Callable[[int], Batch], first: int, last: int):
        self._make, self._step, self._last = make, first, last
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "batch")
        self._next = self._pool.submit(make, first)

    def first(self) -> Batch:
        """Returns the next batch, which `take` returns again."""
        return self._next.result()

    def is_slower_than(self, other: concurrent.futures.Future) -> bool:
        """Waits for the next batch or for `other`, and returns whether the batch is still missing."""
        concurrent.futures.wait((self._next, other), return_when=concurrent.futures.FIRST_COMPLETED)
        return not self._next.done()

    def take(self) -> Batch:
        """Returns the next batch as soon as it is ready."""
        batch = self._next.result()
        self._step += 1
        if self._step < self._last:
            self._next = self._pool.submit(self._make, self._step)
        return batch

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
